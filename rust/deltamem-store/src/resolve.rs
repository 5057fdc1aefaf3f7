//! Which commit a text means, as in Git: `HEAD`, a branch, a tag, the beginning of an id; behind it `~n`, `^`, `^n`, or `@{n}` for
//! where a branch was n moves ago.

use crate::backend::Kind;
use crate::commit::{Commit, CommitId};
use crate::error::{Error, shortened};
use crate::record::{Move, RefKind, move_id};
use crate::store::{Opened, Store};

/// The fewest hex digits that name a commit.
pub const MIN_PREFIX: usize = 4;
/// The longest text that is looked at.
const MAX_TEXT: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// `~n`: n first parents back.
    Back(u64),
    /// `^n`: parent number n; 0 is the commit itself.
    Parent(usize),
}

impl Store {
    /// The commit that `text` means in memory `name`; `HEAD` is the memory's branch in use.
    ///
    /// # Errors
    /// [`Error::Ref`] when it is no ref, or names a commit that was pruned or never was; [`Error::NotFound`] without such a memory.
    pub fn resolve(&self, name: &str, text: &str) -> Result<CommitId, Error> {
        self.reading(name, |opened| {
            self.resolve_in(opened, text, None).map(|commit| commit.id)
        })
    }

    /// [`Store::resolve`] for somebody who works on `branch`: `HEAD` means that one.
    ///
    /// # Errors
    /// As there.
    pub fn resolve_on(&self, name: &str, branch: &str, text: &str) -> Result<CommitId, Error> {
        self.reading(name, |opened| {
            self.resolve_in(opened, text, Some(branch))
                .map(|commit| commit.id)
        })
    }

    pub(crate) fn resolve_in(
        &self,
        opened: &Opened,
        text: &str,
        branch: Option<&str>,
    ) -> Result<Commit, Error> {
        let fail = |problem: String| Error::Ref {
            name: opened.record.name.clone(),
            text: shortened(text),
            problem: format!("names no commit: {problem}"),
        };
        let (base, ago, steps) = parse(text).map_err(fail)?;
        let head = branch.unwrap_or(&opened.record.head);
        let base = if base.is_empty() || base == "HEAD" || base == "@" {
            head
        } else {
            base
        };
        let mut commit = match ago {
            Some(ago) => {
                let id = self.moves_ago(opened, base, ago)?.map_err(fail)?;
                self.find_commit(opened, id)?
                    .ok_or_else(|| fail(format!("it was commit {id}, which is no longer kept")))?
            }
            None => self.base(opened, base, base == head)?.map_err(fail)?,
        };
        for step in steps {
            let parents = match step {
                Step::Parent(0) => continue,
                Step::Parent(n) => vec![n],
                Step::Back(n) => {
                    if n >= commit.generation {
                        return Err(fail(format!(
                            "~{n} goes beyond the first commit, which is {} back",
                            commit.generation - 1
                        )));
                    }
                    vec![1; usize::try_from(n).unwrap_or(usize::MAX)]
                }
            };
            for parent in parents {
                let Some(id) = commit.parents.get(parent - 1).copied() else {
                    return Err(fail(format!(
                        "commit {} has {} parents, parent {parent} was asked for",
                        commit.id,
                        commit.parents.len()
                    )));
                };
                commit = match self.find_commit(opened, id)? {
                    Some(found) => found,
                    None if opened.record.shallow.contains(&commit.id) => {
                        return Err(fail(format!(
                            "history ends at commit {}: what was before it was pruned",
                            commit.id
                        )));
                    }
                    None => return self.commit_of(opened, id),
                };
            }
        }
        Ok(commit)
    }

    fn base(&self, opened: &Opened, base: &str, is_head: bool) -> Result<Result<Commit, String>, Error> {
        for kind in [RefKind::Branch, RefKind::Tag] {
            if let Some(entry) = opened.record.refs.get(&(kind, base.to_owned())) {
                return self.commit_of(opened, entry.target).map(Ok);
            }
        }
        let hex = base
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        if !hex || base.len() < MIN_PREFIX || base.len() > 64 {
            let problem = if is_head {
                format!("the branch {base:?} has no commit yet")
            } else {
                format!(
                    "it is no branch, no tag, and not the beginning of an id ({MIN_PREFIX} or more of 0-9 and a-f); there are the \
                     branches {}",
                    names(opened)
                )
            };
            return Ok(Err(problem));
        }
        if base.len() == 64 {
            let found = self.find_commit(opened, base.parse()?)?;
            return Ok(found.ok_or_else(|| "there is no such commit; it may have been pruned".into()));
        }
        let mut found: Vec<Commit> = Vec::new();
        self.each_value(opened.group, Kind::Commit, |key, value| {
            let commit = self.open_commit(opened, key, &value)?;
            if commit.id.to_string().starts_with(base) && found.iter().all(|other| other.id != commit.id) {
                found.push(commit);
            }
            Ok(())
        })?;
        Ok(match found.len() {
            0 => Err(format!(
                "no commit's id begins with {base}, and no branch or tag has that name"
            )),
            1 => found.pop().ok_or_else(String::new),
            count => {
                found.sort_unstable_by_key(|commit| commit.id);
                let ids: Vec<String> = found
                    .iter()
                    .take(3)
                    .map(|commit| commit.id.to_string()[..16].to_owned())
                    .collect();
                Err(format!(
                    "{count} commits begin so ({}...); give more digits",
                    ids.join("..., ")
                ))
            }
        })
    }

    /// Where a branch or tag stood `ago` moves ago.
    fn moves_ago(&self, opened: &Opened, base: &str, ago: u64) -> Result<Result<CommitId, String>, Error> {
        let entry = [RefKind::Branch, RefKind::Tag]
            .into_iter()
            .find_map(|kind| opened.record.refs.get(&(kind, base.to_owned())));
        let Some(entry) = entry else {
            return Ok(Err(format!(
                "{base:?} is no branch; there are the branches {}",
                names(opened)
            )));
        };
        if ago == 0 {
            return Ok(Ok(entry.target));
        }
        let mut number = entry.log;
        for step in 1..=ago {
            let Some(last) = self.find_move(opened, number)? else {
                return Ok(Err(format!("its reflog goes back {} moves only", step - 1)));
            };
            if step == ago {
                return Ok(last.old.ok_or_else(|| format!("it was made {step} moves ago")));
            }
            match last.previous {
                Some(previous) => number = previous,
                None => return Ok(Err(format!("it was made {step} moves ago"))),
            }
        }
        Ok(Ok(entry.target))
    }

    pub(crate) fn find_move(&self, opened: &Opened, number: u64) -> Result<Option<Move>, Error> {
        let found = self.objects(opened, Kind::Log, &[move_id(number)])?;
        let Some(bytes) = found.into_iter().next().flatten() else {
            return Ok(None);
        };
        Move::decode(&bytes).map(Some).map_err(|what| {
            Error::damaged(
                format!(
                    "move {number} of {}",
                    self.place(opened.group, Some(&opened.record.name))
                ),
                what,
            )
        })
    }
}

fn names(opened: &Opened) -> String {
    let names: Vec<String> = opened
        .record
        .refs
        .keys()
        .filter(|(kind, _)| *kind == RefKind::Branch)
        .take(10)
        .map(|(_, name)| shortened(name))
        .collect();
    names.join(", ")
}

/// The base, how many moves ago, and the steps back from there.
fn parse(text: &str) -> Result<(&str, Option<u64>, Vec<Step>), String> {
    if text.is_empty() || text.len() > MAX_TEXT {
        return Err(format!("it has {} bytes, expected 1 to {MAX_TEXT}", text.len()));
    }
    let at = text.find("@{");
    let end = at.unwrap_or_else(|| text.find(['~', '^']).unwrap_or(text.len()));
    let (base, mut rest) = text.split_at(end);
    let mut ago = None;
    if let Some(inside) = rest.strip_prefix("@{") {
        let Some((number, after)) = inside.split_once('}') else {
            return Err("@{ is not closed; expected @{n}, n moves ago".into());
        };
        let moves: Result<u64, _> = number.parse();
        ago = Some(moves.map_err(|_| {
            format!(
                "@{{{}}} holds no number; expected @{{n}}, n moves ago",
                shortened(number)
            )
        })?);
        rest = after;
    }
    let mut steps = Vec::new();
    while let Some(sign) = rest.chars().next() {
        rest = &rest[sign.len_utf8()..];
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at(digits);
        rest = after;
        let number: u64 = if digits == 0 {
            1
        } else {
            number.parse().map_err(|_| format!("{number} is too large"))?
        };
        steps.push(match sign {
            '~' => Step::Back(number),
            '^' if number <= 2 => Step::Parent(usize::try_from(number).unwrap_or(usize::MAX)),
            '^' => {
                return Err(format!(
                    "^{number} asks for a parent that no commit has; there are ^1 and ^2"
                ));
            }
            other => {
                return Err(format!(
                    "{other:?} is out of place; expected ~n, ^ or ^n behind a name"
                ));
            }
        });
    }
    Ok((base, ago, steps))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ref_is_a_base_and_steps() {
        use Step::{Back, Parent};
        for (text, base, ago, steps) in [
            ("main", "main", None, vec![]),
            ("HEAD~2", "HEAD", None, vec![Back(2)]),
            ("~", "", None, vec![Back(1)]),
            (
                "what/if^^2~3^0",
                "what/if",
                None,
                vec![Parent(1), Parent(2), Back(3), Parent(0)],
            ),
            ("main@{1}~1", "main", Some(1), vec![Back(1)]),
            ("@{0}", "", Some(0), vec![]),
            ("@", "@", None, vec![]),
        ] {
            assert_eq!(parse(text), Ok((base, ago, steps)), "{text}");
        }
        let long = "a".repeat(2000);
        for bad in [
            "",
            "a~x",
            "a^3",
            "a@{",
            "a@{-1}",
            "a@{x}",
            "a~99999999999999999999",
            "a~1é",
            &long,
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
