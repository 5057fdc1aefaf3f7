//! Which names memories, branches and tags may have. Names are compared byte by byte: nothing is normalised, and no name means a path.

use crate::error::{Error, shortened};

/// The longest name of a memory, in bytes of UTF-8.
pub const MAX_NAME: usize = 512;
/// The longest name of a branch or a tag, in bytes of UTF-8.
pub const MAX_REF_NAME: usize = 255;

/// Checks a memory's name: any Unicode, 1 to 512 bytes, no control characters.
///
/// # Errors
/// [`Error::Name`] says what is wrong with it.
pub fn check_memory(name: &str) -> Result<(), Error> {
    check(
        "memory's name",
        name,
        MAX_NAME,
        "1 to 512 bytes of any Unicode without control characters",
    )
}

/// Checks the name of a branch (`what` = `branch's name`) or a tag: 1 to 255 bytes of Unicode without control characters, spaces or
/// any of `~ ^ : @ ? * [ \`, which have a meaning where a commit is named; not `HEAD`, not 64 hex digits, which
/// would read as a commit's id (a shorter one that reads as an id's beginning is found first as a name); not beginning with `-`.
///
/// # Errors
/// [`Error::Name`] says what is wrong with it.
pub fn check_ref(what: &'static str, name: &str) -> Result<(), Error> {
    const EXPECTED: &str = "1 to 255 bytes of Unicode without spaces, control characters or any of ~ ^ : @ ? * [ \\, not HEAD, not 64 \
                            hex digits";
    check(what, name, MAX_REF_NAME, EXPECTED)?;
    let problem = if let Some(found) = name
        .chars()
        .find(|&c| c.is_whitespace() || "~^:@?*[\\".contains(c))
    {
        format!("holds {found:?}")
    } else if name == "HEAD" {
        "is the name of the branch in use".to_owned()
    } else if name.starts_with('-') {
        "begins with -, which reads as an option".to_owned()
    } else if name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        "reads as a commit's id".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::Name {
        what,
        found: shortened(name),
        problem,
        expected: EXPECTED,
    })
}

fn check(what: &'static str, name: &str, max: usize, expected: &'static str) -> Result<(), Error> {
    let problem = if name.is_empty() {
        "is empty".to_owned()
    } else if name.len() > max {
        format!("has {} bytes", name.len())
    } else if let Some(found) = name.chars().find(|c| c.is_control()) {
        format!("holds the control character U+{:04X}", u32::from(found))
    } else {
        return Ok(());
    };
    Err(Error::Name {
        what,
        found: shortened(name),
        problem,
        expected,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_unicode_names_a_memory_and_nothing_means_a_path() {
        let longest = "é".repeat(256);
        for name in [
            "a",
            "Zoë",
            "../../etc/passwd",
            "C:\\x",
            ".",
            "日本/語",
            " ",
            "\u{202e}x",
            &longest,
        ] {
            assert!(check_memory(name).is_ok(), "{name:?}");
        }
        for name in ["", "a\nb", "a\0", "\u{7f}", "\u{85}", &format!("{longest}x")] {
            assert!(matches!(check_memory(name), Err(Error::Name { .. })), "{name:?}");
        }
    }

    #[test]
    fn a_refs_name_never_reads_as_something_else() {
        for name in ["main", "what/if", "v1.0", "café", "feed"] {
            assert!(check_ref("branch's name", name).is_ok(), "{name:?}");
        }
        for name in [
            "",
            "HEAD",
            "a b",
            "a~1",
            "a^",
            "a@{1}",
            &"0f".repeat(32),
            "-x",
            "a:b",
            &"x".repeat(256),
        ] {
            assert!(check_ref("branch's name", name).is_err(), "{name:?}");
        }
    }
}
