#![allow(clippy::unwrap_used)]

use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

fn blake3_of(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// The manifest's bytes with the digest that belongs to them.
fn signed(mut manifest: Value) -> Vec<u8> {
    manifest["digest"] = json!("0".repeat(64));
    let blank = serde_json::to_string_pretty(&manifest).unwrap();
    let digest = blake3_of(blank.as_bytes());
    blank
        .replacen(
            &format!("\"digest\": \"{}\"", "0".repeat(64)),
            &format!("\"digest\": \"{digest}\""),
            1,
        )
        .into_bytes()
}

fn files() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("model.onnx", b"a graph, as far as this test goes".to_vec()),
        (
            "model.onnx.data",
            (0..2000_u32).map(|i| (i * 31 % 251) as u8).collect(),
        ),
        ("model.measured.onnx", b"the measured graph".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("chat_template.jinja", b"{{ messages[0].content }}".to_vec()),
    ]
}

fn manifest() -> Value {
    let parts = [
        ("backbone", 'a'),
        ("adapter", 'b'),
        ("config", 'c'),
        ("tokenizer", 'd'),
    ]
    .map(|(name, digit)| (name, digit.to_string().repeat(64)));
    let joined: Vec<&str> = parts.iter().map(|(_, digest)| digest.as_str()).collect();
    let list: serde_json::Map<String, Value> = files()
        .into_iter()
        .map(|(name, content)| {
            (
                name.to_owned(),
                json!({"bytes": content.len(), "blake3": blake3_of(&content)}),
            )
        })
        .collect();
    json!({
        "format": "deltamem-bundle",
        "format_version": 1,
        "digest": "",
        "name": "test",
        "fingerprint": blake3_of(joined.join("\n").as_bytes()),
        "fingerprint_parts": parts.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
        "backbone": {
            "architecture": "Qwen3ForCausalLM", "model_type": "qwen3", "hidden_size": 64, "num_layers": 3,
            "num_attention_heads": 4, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 256, "context_length": 2048
        },
        "memory": {
            "layers": [0, 1, 2], "heads": 1, "rank": 8, "alpha": 16.0, "update_mode": "standard", "couple_lambda": true,
            "gates": "row", "normalize_qk": true, "delta_heads": ["q", "o"], "write_granularity": "token"
        },
        "graph": {
            "file": "model.onnx", "measured_file": "model.measured.onnx", "kv_layers": [0, 1, 2], "kv_dtype": "float32",
            "shared_kv": true, "position_ids": false, "states": [], "span_width": null
        },
        "precision": "fp32",
        "tokens": {"bos": 1, "eos": [2], "pad": 0},
        "text": {"tokenizer": "tokenizer.json", "chat_template": "chat_template.jinja", "bos_token": "<s>", "eos_token": "</s>"},
        "files": list,
        "check": {"against": "transformers", "tokens": 160, "max_abs_diff": 2.1e-06, "tolerance": 1e-04, "method": "whole"},
        "made_by": {"deltamem-export": "0.1.0"}
    })
}

fn bundle_with(manifest: Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in files() {
        fs::write(dir.path().join(name), content).unwrap();
    }
    fs::write(dir.path().join(MANIFEST), signed(manifest)).unwrap();
    dir
}

/// The test's manifest with the entry at a JSON pointer set, and everything else as it belongs.
fn changed(pointer: &str, value: Value) -> Value {
    let mut manifest = manifest();
    *manifest.pointer_mut(pointer).unwrap() = value;
    manifest
}

#[allow(clippy::needless_pass_by_value)] // made for the call
fn state(input: &str, output: &str, dtype: &str, shape: Value) -> Value {
    json!({"input": input, "output": output, "dtype": dtype, "shape": shape})
}

fn open(dir: &TempDir) -> Result<Bundle, BundleError> {
    Bundle::open(dir.path(), Verify::Full)
}

#[test]
fn a_whole_bundle_opens_and_says_what_it_holds() {
    let dir = bundle_with(manifest());
    for verify in [Verify::Full, Verify::Sizes] {
        let bundle = Bundle::open(dir.path(), verify).unwrap();
        assert_eq!(bundle.geometry(), Geometry::new(3, 1, 8).unwrap());
        assert_eq!(
            bundle.fingerprint().to_string(),
            manifest()["fingerprint"].as_str().unwrap()
        );
        assert_eq!(bundle.path("model.onnx"), bundle.dir().join("model.onnx"));
        assert_eq!(bundle.manifest().memory.delta_heads, [DeltaHead::Q, DeltaHead::O]);
        assert_eq!(bundle.manifest().tokens.eos, [2]);
        // What is written again is the same manifest.
        let again: Manifest =
            serde_json::from_value(serde_json::to_value(bundle.manifest()).unwrap()).unwrap();
        assert_eq!(&again, bundle.manifest());
    }
}

#[test]
fn what_older_manifests_leave_out_has_its_meaning() {
    let mut older = manifest();
    older["graph"].as_object_mut().unwrap().remove("states");
    older["graph"].as_object_mut().unwrap().remove("span_width");
    older["check"].as_object_mut().unwrap().remove("method");
    let bundle = open(&bundle_with(older)).unwrap();
    assert_eq!(bundle.manifest().graph.states, []);
    assert_eq!(bundle.manifest().graph.span_width, None);
    assert_eq!(
        bundle.manifest().check.as_ref().unwrap().method,
        CheckMethod::Whole
    );
}

#[test]
fn spans_states_and_separate_caches_are_read() {
    for (word, granularity) in [
        ("message", WriteGranularity::Message),
        ("sentence", WriteGranularity::Sentence),
    ] {
        let mut newer = manifest();
        newer["memory"]["write_granularity"] = json!(word);
        newer["graph"]["span_width"] = json!(32);
        newer["graph"]["shared_kv"] = json!(false);
        newer["graph"]["kv_dtype"] = json!("int8");
        newer["graph"]["kv_layers"] = json!([1]);
        newer["graph"]["states"] =
            json!([state("past.0.conv", "present.0.conv", "bfloat16", json!([64, 2]))]);
        newer["check"]["method"] = json!("layers");
        newer["check"]["mean_abs_diff"] = json!(1e-7);
        let bundle = open(&bundle_with(newer)).unwrap();
        let graph = &bundle.manifest().graph;
        assert_eq!(bundle.manifest().memory.write_granularity, granularity);
        assert_eq!(granularity.as_str(), word);
        assert_eq!(
            (graph.span_width, graph.shared_kv, graph.kv_dtype.bytes()),
            (Some(32), false, 1)
        );
        assert_eq!(graph.states[0].shape, [64, 2]);
        assert_eq!(graph.states[0].dtype.bytes(), 2);
        assert_eq!(
            bundle.manifest().check.as_ref().unwrap().method,
            CheckMethod::Layers
        );
    }
}

#[test]
fn a_bundle_of_token_ids_only_has_no_text_and_no_tokenizer_in_its_fingerprint() {
    let mut ids_only = manifest();
    ids_only["text"] = Value::Null;
    let parts = ids_only["fingerprint_parts"].as_object_mut().unwrap();
    for none in [Value::Null, json!("none")] {
        parts.insert("tokenizer".into(), none);
    }
    let joined = format!("{}\n{}\n{}\nnone", "a".repeat(64), "b".repeat(64), "c".repeat(64));
    ids_only["fingerprint"] = json!(blake3_of(joined.as_bytes()));
    assert_eq!(open(&bundle_with(ids_only)).unwrap().manifest().text, None);
}

/// The test's manifest with a graph for CUDA beside the processor's.
fn with_cuda() -> Value {
    let mut manifest = manifest();
    let mut cuda = manifest["graph"].clone();
    for (name, value) in [
        ("device", json!("cuda")),
        ("precision", json!("bf16")),
        ("precision_setting", json!("bf16")),
        ("file", json!("model.cuda.onnx")),
        ("measured_file", Value::Null),
        ("kv_dtype", json!("bfloat16")),
        ("logits_dtype", json!("float32")),
        ("files", json!(["model.cuda.onnx", "model.onnx.data"])),
        ("check", Value::Null),
        ("not_checked", json!("the CPU has no bfloat16")),
    ] {
        cuda[name] = value;
    }
    manifest["graphs"] = json!([cuda]);
    let graph = b"a graph for CUDA";
    manifest["files"]["model.cuda.onnx"] = json!({"bytes": graph.len(), "blake3": blake3_of(graph)});
    manifest
}

fn open_with_cuda(manifest: Value) -> Result<Bundle, BundleError> {
    let dir = bundle_with(manifest);
    fs::write(dir.path().join("model.cuda.onnx"), b"a graph for CUDA").unwrap();
    open(&dir)
}

#[test]
fn a_bundle_has_a_graph_for_each_device_under_one_fingerprint() {
    use GraphDevice::{Cpu, Cuda};
    let bundle = open_with_cuda(with_cuda()).unwrap();
    let first = bundle.manifest().clone();
    assert_eq!(first.devices(), [Cpu, Cuda]);
    assert_eq!(first.graph_on(Cuda), Some(&first.graphs[0]));
    assert_eq!(bundle.clone().on(Cpu).unwrap().manifest(), &first);

    let cuda = bundle.clone().on(Cuda).unwrap();
    let on_cuda = cuda.manifest();
    assert_eq!(cuda.fingerprint(), bundle.fingerprint());
    assert_eq!(
        (on_cuda.graph.file.as_str(), on_cuda.graph.kv_dtype),
        ("model.cuda.onnx", ElementType::Bfloat16)
    );
    assert_eq!((on_cuda.precision.as_str(), &on_cuda.check), ("bf16", &None));
    assert!(on_cuda.graph.not_checked.is_some());
    assert_eq!(on_cuda.devices(), [Cpu, Cuda]);

    let back = cuda.on(Cpu).unwrap();
    let back = back.manifest();
    assert_eq!(
        (&back.precision, &back.check, &back.graph.file),
        (&first.precision, &first.check, &first.graph.file)
    );
    assert_eq!(back.precision_of(&back.graphs[0]), "bf16");
}

#[test]
fn a_device_without_a_graph_is_an_error_that_says_how_to_add_one() {
    let bundle = open(&bundle_with(manifest())).unwrap();
    assert_eq!(bundle.manifest().devices(), [GraphDevice::Cpu]);
    let error = bundle.on(GraphDevice::Cuda).unwrap_err().to_string();
    for words in [
        "are for cpu, not for cuda",
        "--device cuda --precision fp16 --into ",
    ] {
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn bundles_of_older_exporters_say_no_device_and_have_one() {
    use GraphDevice::{Cpu, Cuda};
    for (precision, devices) in [
        ("fp32", vec![Cpu]),
        ("int4", vec![Cpu]),
        ("fp16", vec![Cpu, Cuda]),
        ("bf16", vec![Cuda]),
    ] {
        let bundle = open(&bundle_with(changed("/precision", json!(precision)))).unwrap();
        assert_eq!(bundle.manifest().devices(), devices, "{precision}");
        for device in devices {
            let same = bundle.clone().on(device).unwrap();
            assert_eq!(same.manifest(), bundle.manifest());
        }
    }
}

#[test]
fn further_graphs_that_cannot_be_are_refused_by_field() {
    for (pointer, value, field) in [
        ("/device", json!("cpu"), "graphs[0].device"),
        ("/device", json!("abacus"), "line"),
        ("/logits_dtype", json!("float16"), "graphs[0].logits_dtype"),
        ("/kv_layers", json!([0, 7]), "graphs[0].kv_layers"),
        ("/span_width", json!(32), "graphs[0].span_width"),
        (
            "/states",
            json!([state("", "b", "float16", json!([2]))]),
            "graphs[0].states[0].input",
        ),
        ("/file", json!("other.onnx"), "graphs[0].file"),
        ("/files", json!(["model.onnx", "../secret"]), "graphs[0].files"),
    ] {
        let mut manifest = with_cuda();
        *manifest["graphs"][0].pointer_mut(pointer).unwrap() = value;
        let error = open_with_cuda(manifest).unwrap_err();
        assert!(
            matches!(&error, BundleError::Inconsistent { field: named, .. } if named.starts_with(field)),
            "{pointer}: {error}"
        );
    }
}

#[test]
fn paths_without_a_bundle_are_named() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        Bundle::open(&dir.path().join("nowhere"), Verify::Full),
        Err(BundleError::NotFound { .. })
    ));
    let error = open(&dir).unwrap_err();
    assert!(
        matches!(error, BundleError::NotABundle { .. })
            && error.to_string().contains("holds no deltamem.json"),
        "{error}"
    );
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(matches!(
        Bundle::open(&file, Verify::Full),
        Err(BundleError::NotABundle { .. })
    ));
    fs::create_dir(dir.path().join(MANIFEST)).unwrap();
    assert!(matches!(open(&dir), Err(BundleError::NotABundle { .. })));
}

#[test]
fn other_formats_and_versions_are_named() {
    assert!(matches!(
        open(&bundle_with(changed("/format", json!("gguf")))),
        Err(BundleError::NotABundle { .. })
    ));
    let newer = open(&bundle_with(changed("/format_version", json!(2)))).unwrap_err();
    assert!(
        matches!(newer, BundleError::UnsupportedVersion { found: 2 })
            && newer.to_string().contains("update deltamem-rt"),
        "{newer}"
    );
    let older = open(&bundle_with(changed("/format_version", json!(0)))).unwrap_err();
    assert!(older.to_string().contains("export the bundle again"), "{older}");
}

#[test]
fn a_manifest_of_any_length_is_refused_before_it_is_read() {
    let dir = bundle_with(manifest());
    let file = fs::OpenOptions::new()
        .write(true)
        .open(dir.path().join(MANIFEST))
        .unwrap();
    file.set_len(1 << 40).unwrap();
    let error = open(&dir).unwrap_err();
    assert!(
        matches!(&error, BundleError::Damaged { file, .. } if file == MANIFEST),
        "{error}"
    );
}

fn refused_by_field(pointer: &str, value: &Value, field: &str) {
    let error = open(&bundle_with(changed(pointer, value.clone()))).unwrap_err();
    assert!(
        matches!(&error, BundleError::Inconsistent { field: named, .. } if named.starts_with(field)),
        "{pointer} {value}: {error}"
    );
}

#[test]
fn spans_and_states_that_cannot_be_are_refused_by_field() {
    for (pointer, value, field) in [
        ("/graph/span_width", json!(32), "graph.span_width"),
        ("/graph/kv_dtype", json!("complex"), "line"),
        ("/graph/states", Value::Null, "line"),
        (
            "/graph/states",
            json!([{"input": "a", "output": "b", "dtype": "float32"}]),
            "line",
        ),
        (
            "/graph/states",
            json!([state("a", "b", "float64", json!([2]))]),
            "line",
        ),
        (
            "/graph/states",
            json!([state("a", "b", "int8", json!([2]))]),
            "graph.states[0].dtype",
        ),
        (
            "/graph/states",
            json!([state("a", "a", "float32", json!([2]))]),
            "graph.states[0].output",
        ),
        (
            "/graph/states",
            json!([state("", "b", "float32", json!([2]))]),
            "graph.states[0].input",
        ),
        (
            "/graph/states",
            json!([state("a\0", "b", "float32", json!([2]))]),
            "graph.states[0].input",
        ),
        (
            "/graph/states",
            json!([
                state("a", "b", "float16", json!([2])),
                state("a", "c", "float16", json!([2]))
            ]),
            "graph.states[1].input",
        ),
        (
            "/graph/states",
            json!([state("a", "b", "float32", json!([4, 0]))]),
            "graph.states[0].shape",
        ),
        (
            "/graph/states",
            json!([state("a", "b", "float32", json!([1 << 24, 2]))]),
            "graph.states[0].shape",
        ),
        (
            "/graph/states",
            json!([state("a", "b", "float32", json!([1_u64 << 40, 1_u64 << 40]))]),
            "graph.states[0].shape",
        ),
        (
            "/graph/states",
            json!([state("a", "b", "float32", json!([1, 1, 1, 1, 1, 1, 1]))]),
            "graph.states[0].shape",
        ),
        (
            "/graph/states",
            json!(vec![state("a", "b", "float32", json!([1])); 5000]),
            "graph.states",
        ),
    ] {
        refused_by_field(pointer, &value, field);
    }
}

#[test]
fn a_manifest_that_says_what_cannot_be_is_refused_by_field() {
    for (pointer, value, field) in [
        ("/fingerprint", json!("e".repeat(64)), "fingerprint"),
        ("/backbone/num_layers", json!(0), "backbone.num_layers"),
        (
            "/backbone/context_length",
            json!(1_u64 << 40),
            "backbone.context_length",
        ),
        (
            "/backbone/num_attention_heads",
            json!(3),
            "backbone.num_attention_heads",
        ),
        ("/backbone/vocab_size", json!(2), "tokens.eos"),
        ("/memory/layers", json!([0, 1, 3]), "memory.layers"),
        ("/memory/layers", json!([1, 0]), "memory.layers"),
        ("/memory/layers", json!([0, 0]), "memory.layers"),
        ("/memory/layers", json!([]), "memory"),
        ("/memory/heads", json!(0), "memory"),
        ("/memory/rank", json!(129), "memory"),
        ("/memory/delta_heads", json!([]), "memory.delta_heads"),
        ("/memory/delta_heads", json!(["o", "q"]), "memory.delta_heads"),
        ("/memory/delta_heads", json!(["q", "q"]), "memory.delta_heads"),
        ("/memory/delta_heads", json!(["x"]), "line"),
        ("/memory/update_mode", json!("sideways"), "line"),
        ("/memory/write_granularity", json!("chapter"), "line"),
        ("/memory/write_granularity", json!("sentence"), "graph.span_width"),
        ("/check/method", json!("guess"), "line"),
        ("/memory/rank", json!(-8), "line"),
        ("/memory/rank", json!(8.5), "line"),
        ("/graph/kv_layers", json!([0, 7]), "graph.kv_layers"),
        ("/graph/file", json!("other.onnx"), "graph.file"),
        ("/graph/measured_file", json!("other.onnx"), "graph.measured_file"),
        ("/text/tokenizer", json!("../tokenizer.json"), "text.tokenizer"),
        ("/text/chat_template", json!("other.jinja"), "text.chat_template"),
        ("/tokens/eos", json!([256]), "tokens.eos"),
        ("/tokens/bos", json!(-1), "tokens.bos"),
        ("/tokens/pad", json!(1000), "tokens.pad"),
    ] {
        refused_by_field(pointer, &value, field);
    }
}

/// A manifest that was calibrated: three layers, one head, two delta heads.
fn calibrated() -> Value {
    let of = |columns: usize| json!(vec![vec![2.5; columns]; 3]);
    let mut manifest = manifest();
    manifest["health"] = json!({
        "stream": {"description": "talk", "conversations": 2, "turns": 40, "tokens": 900},
        "margin": 1.1, "quantiles": [0.5, 1.0], "figures": {"norm": [[[1.0, 2.0]]]},
        "bounds": {
            "norm": of(1), "spectral_norm": of(1), "effective_rank": of(1), "concentration": of(1), "change": of(1), "path": of(1), "collapse": of(1), "churn": of(1), "scatter": of(1),
            "delta_ratio": of(2), "beta_mean": of(1)
        }
    });
    manifest
}

#[test]
fn bounds_are_read_and_those_of_another_memory_are_refused_by_field() {
    let health = open(&bundle_with(calibrated()))
        .unwrap()
        .manifest()
        .health
        .clone();
    assert_eq!(health.unwrap().stream.turns, 40);
    for (pointer, value, field) in [
        ("/norm", json!([[1.0], [1.0]]), "norm"),
        ("/path", json!([[1.0], [1.0], [1.0, 2.0]]), "path"),
        ("/delta_ratio", json!([[1.0], [1.0], [1.0]]), "delta_ratio"),
        ("/change/2/0", json!(-1.0), "change"),
    ] {
        let mut manifest = calibrated();
        *manifest["health"]["bounds"].pointer_mut(pointer).unwrap() = value;
        let error = open(&bundle_with(manifest)).unwrap_err();
        assert!(
            matches!(&error, BundleError::Inconsistent { field: found, .. } if *found == format!("health.bounds.{field}")),
            "{error}"
        );
    }
}

#[test]
fn names_that_lead_out_of_the_bundle_are_refused() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), b"secret").unwrap();
    let secret = outside.path().join("secret").display().to_string();
    for name in [
        "../secret",
        "/etc/hosts",
        secret.as_str(),
        "a/b",
        "a\\b",
        ".",
        "..",
        "",
        "c:x",
        "a\0b",
        MANIFEST,
        "./model.onnx",
        "model.onnx/",
    ] {
        let mut manifest = manifest();
        manifest["files"][name] = json!({"bytes": 6, "blake3": blake3_of(b"secret")});
        let error = open(&bundle_with(manifest)).unwrap_err();
        assert!(
            matches!(&error, BundleError::Inconsistent { field, .. } if field == "files"),
            "{name:?}: {error}"
        );
    }
}

#[cfg(unix)]
#[test]
fn links_inside_the_bundle_are_followed_and_links_out_of_it_are_not() {
    let dir = bundle_with(manifest());
    fs::rename(dir.path().join("model.onnx"), dir.path().join("blob")).unwrap();
    std::os::unix::fs::symlink("blob", dir.path().join("model.onnx")).unwrap();
    open(&dir).unwrap();

    let outside = tempfile::tempdir().unwrap();
    fs::rename(dir.path().join("blob"), outside.path().join("blob")).unwrap();
    fs::remove_file(dir.path().join("model.onnx")).unwrap();
    std::os::unix::fs::symlink(outside.path().join("blob"), dir.path().join("model.onnx")).unwrap();
    for verify in [Verify::Full, Verify::Sizes] {
        let error = Bundle::open(dir.path(), verify).unwrap_err();
        assert!(
            matches!(&error, BundleError::Damaged { file, .. } if file == "model.onnx"),
            "{error}"
        );
        assert!(error.to_string().contains("out of the bundle"), "{error}");
    }
    // A link to itself is an error of the system, not a hang.
    fs::remove_file(dir.path().join("model.onnx")).unwrap();
    std::os::unix::fs::symlink("model.onnx", dir.path().join("model.onnx")).unwrap();
    assert!(matches!(open(&dir), Err(BundleError::Io { .. })));
}

#[test]
fn a_file_that_is_no_file_is_refused() {
    let dir = bundle_with(manifest());
    fs::remove_file(dir.path().join("model.onnx")).unwrap();
    fs::create_dir(dir.path().join("model.onnx")).unwrap();
    assert!(matches!(open(&dir), Err(BundleError::Damaged { .. })));
}

#[test]
fn sizes_alone_find_what_was_cut_and_contents_what_was_changed() {
    let dir = bundle_with(manifest());
    let path = dir.path().join("model.onnx.data");
    let mut content = fs::read(&path).unwrap();
    content[1234] ^= 1;
    fs::write(&path, &content).unwrap();
    Bundle::open(dir.path(), Verify::Sizes).unwrap();
    let error = open(&dir).unwrap_err();
    assert!(
        matches!(&error, BundleError::Damaged { file, .. } if file == "model.onnx.data"),
        "{error}"
    );

    fs::write(&path, &content[..1999]).unwrap();
    let error = Bundle::open(dir.path(), Verify::Sizes).unwrap_err();
    assert_eq!(
        error.to_string(),
        "model.onnx.data: found 1999 bytes, expected 2000; the bundle is incomplete or was changed, copy or export it again"
    );
}

#[test]
fn a_thousand_mutated_bundles_are_errors() {
    let dir = bundle_with(manifest());
    let names: Vec<String> = files()
        .iter()
        .map(|(name, _)| (*name).to_owned())
        .chain([MANIFEST.to_owned()])
        .collect();
    let originals: Vec<Vec<u8>> = names
        .iter()
        .map(|name| fs::read(dir.path().join(name)).unwrap())
        .collect();
    let mut state = 0x1357_9BDF_2468_ACE1_u64;
    let mut below = |limit: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % limit as u64).unwrap()
    };
    for round in 0..1000 {
        // Every other round the manifest, where most can go wrong.
        let which = if round % 2 == 0 {
            names.len() - 1
        } else {
            below(names.len())
        };
        let (path, original) = (dir.path().join(&names[which]), &originals[which]);
        let mut mutant = original.clone();
        let at = below(mutant.len());
        match below(6) {
            0 | 1 => mutant[at] ^= 1 << below(8),
            2 => mutant.truncate(at),
            3 => mutant.insert(at, u8::try_from(below(256)).unwrap()),
            4 => {
                mutant.remove(at);
            }
            _ => {
                let from = below(mutant.len());
                let piece: Vec<u8> = mutant[from..(from + 40).min(original.len())].to_vec();
                mutant.splice(at..at, piece);
            }
        }
        if &mutant == original {
            continue;
        }
        if below(10) == 0 {
            fs::remove_file(&path).unwrap();
        } else {
            fs::write(&path, &mutant).unwrap();
        }
        let error = open(&dir).err();
        assert!(
            error.is_some(),
            "round {round}: a changed {} was accepted",
            names[which]
        );
        assert!(error.is_some_and(|error| error.to_string().len() < 1500));
        fs::write(&path, original).unwrap();
    }
    open(&dir).unwrap();
}
