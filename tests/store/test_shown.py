"""How results look, and what an error is."""

from __future__ import annotations

import builtins
import importlib.util

import pytest

import deltamem_rt as dm


@pytest.fixture(scope="module")
def session(model: dm.Model):
    with dm.Store.in_memory() as store, model.session("ada", store=store) as session:
        session.feed("One.")
        session.end_turn()
        session.commit("the <b>first</b> & only\nwith a second line")
        session.feed("Two.")
        session.end_turn()
        session.commit(meta={"turn": 2})
        yield session


def test_a_commit_fits_a_line(session):
    first, second = session.log()[1], session.log()[0]
    assert "\n" not in repr(first)
    assert first.short in repr(first)
    assert "the <b>first</b> & only" in repr(first)
    assert "{'turn': 2}" in repr(second)
    assert len({first, first, second}) == 2
    assert first != second
    assert first != first.id


def test_a_diff_is_a_table(session):
    diff = session.diff()
    lines = repr(diff).splitlines()
    assert lines[0] == f"{diff.a.short} -> {diff.b.short}"
    layers, heads = session.memory.shape[:2]
    assert [line.split()[:2] for line in lines[2:-1]] == [[str(i), str(h)] for i in range(layers) for h in range(heads)]
    assert lines[-1].split()[0] == "all"
    assert len({line.index("0.") > 0 for line in lines[2:]}) == 1
    assert diff._repr_html_().count("<tr>") == len(lines) - 1
    assert repr(session.diff(None, "HEAD~1")).startswith("empty -> ")


def test_words_of_a_message_are_no_html(session):
    shown = session.blame("One.")._repr_html_()
    assert "the &lt;b&gt;first&lt;/b&gt; &amp; only" in shown
    assert "<b>" not in shown


def test_a_plot_without_matplotlib_says_what_to_install(session, monkeypatch):
    find = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return find(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        session.diff().plot()


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed (it is optional)"
)
def test_a_plot_is_a_heat_map_of_layers_and_heads(session):
    import matplotlib

    matplotlib.use("Agg")
    axes = session.diff().plot()
    assert axes.images[0].get_array().shape == session.memory.shape[:2]
    assert session.diff().plot(axes) is axes


def test_sessions_and_stores_say_where_they_are(session, tmp_path):
    assert session.head.short in repr(session)
    assert '"main"' in repr(session)
    with dm.Store(tmp_path / "x.db", key=bytes(32)) as store:
        assert repr(store) == f"Store('{tmp_path / 'x.db'}', encrypted)"


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (dm.NotFoundError, KeyError),
        (dm.ExistsError, ValueError),
        (dm.RefError, ValueError),
        (dm.ConflictError, RuntimeError),
        (dm.StoreKeyError, ValueError),
        (dm.StoreFormatError, ValueError),
        (dm.DamagedError, ValueError),
        (dm.StoreLockedError, RuntimeError),
        (dm.ReadOnlyError, PermissionError),
        (dm.StoreFullError, OSError),
        (dm.StoreIOError, OSError),
        (dm.UnavailableError, ConnectionError),
        (dm.ServerError, ConnectionError),
    ],
)
def test_errors_are_one_tree_with_pythons_words(error, builtin):
    assert issubclass(error, dm.StoreError)
    assert issubclass(error, dm.DeltaMemError)
    assert issubclass(error, builtin)
    assert str(error("what was found")) == "what was found"


def test_a_store_passes_to_other_threads_but_is_no_pickle(session):
    import pickle

    with pytest.raises(TypeError):
        pickle.dumps(session)
