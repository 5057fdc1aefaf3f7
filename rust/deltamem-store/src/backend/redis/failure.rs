//! What a failed call means: which error the caller gets, and what the server may have done.

use std::sync::Arc;
use std::time::Duration;

use redis::{ErrorKind, RedisError, ServerError};

use crate::error::Error;

/// What became of a request that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// Nothing was done, and it may go well the next time.
    Early,
    /// Nothing was done, and repeating is of no use.
    Refused,
    /// The connection broke: it was done, or not.
    Lost,
    /// No answer came in time: it was done, or not, or will be.
    Silent,
    /// It was done, but is not as safe as was asked for.
    Weak,
}

/// A call that failed.
#[derive(Debug)]
pub(super) struct Failure {
    /// Boxed, since most calls go well and carry its room.
    pub error: Box<Error>,
    pub fate: Fate,
}

impl Failure {
    fn new(fate: Fate, error: Error) -> Self {
        Self {
            error: Box::new(error),
            fate,
        }
    }

    pub fn unavailable(place: &str, fate: Fate, reason: impl Into<String>) -> Self {
        let (place, reason) = (place.to_owned(), reason.into());
        Self::new(fate, Error::Unavailable { place, reason })
    }

    /// A server that is asked in vain until something is put right.
    fn server(place: &str, fate: Fate, problem: impl Into<String>) -> Self {
        let (place, problem) = (place.to_owned(), problem.into());
        Self::new(fate, Error::Server { place, problem })
    }

    /// No time is left.
    pub fn late(place: &str, fate: Fate, what: &str, limit: Duration) -> Self {
        Self::unavailable(place, fate, format!("{what} within {limit:?}"))
    }

    /// An answer of another form than the command has.
    pub fn odd(place: &str, command: &str) -> Self {
        let problem = format!(
            "it answered {command} in a form that neither Redis nor Valkey uses; check what listens there"
        );
        Self::server(place, Fate::Lost, problem)
    }

    /// An error of the connection, or one that the server gave while it was set up.
    pub fn of_connection(place: &str, error: &RedisError, limit: Duration) -> Self {
        if error.is_timeout() {
            return Self::late(place, Fate::Silent, "no answer came", limit);
        }
        let text = error.to_string();
        match error.kind() {
            ErrorKind::AuthenticationFailed => {
                return Self::server(place, Fate::Refused, credentials(&text));
            }
            ErrorKind::InvalidClientConfig | ErrorKind::Client => {
                let problem = format!("no connection can be made ({text}); check the address");
                return Self::server(place, Fate::Refused, problem);
            }
            ErrorKind::Server(_) | ErrorKind::Extension => {
                return Self::of_words(place, error.code().unwrap_or_default(), &text);
            }
            _ => {}
        }
        if let Some(problem) = tls(error) {
            return Self::server(place, Fate::Refused, problem);
        }
        let reason = if error.is_connection_refusal() {
            "the connection was refused: check that the server runs and that the address is right".to_owned()
        } else {
            format!("the connection broke ({text})")
        };
        Self::unavailable(place, Fate::Lost, reason)
    }

    /// An error that the server answered with.
    pub fn of_server(place: &str, error: &ServerError) -> Self {
        let text = error.details().unwrap_or_default();
        Self::of_words(place, error.code(), text)
    }

    /// An older server wraps a script's error in its own words, so the words count as much as the code.
    fn of_words(place: &str, code: &str, text: &str) -> Self {
        let is = |words: &[&str]| {
            words
                .iter()
                .any(|word| code == *word || text.contains(&format!("-{word} ")))
        };
        let said = format!("the server said: {code} {text}");
        let server = |problem: String| Self::server(place, Fate::Refused, problem);
        if is(&["OOM"]) || text.contains("No space left on device") {
            let place = place.to_owned();
            Self::new(Fate::Refused, Error::Full { place, reason: said })
        } else if is(&["NOAUTH", "WRONGPASS"]) {
            server(credentials(&said))
        } else if is(&["NOPERM"]) {
            server(format!(
                "the user may not do what a store needs; allow it ~PREFIX* +hmget +hget +hscan +scan +eval +evalsha +hset +hdel +unlink \
                 +exists, for sizes and compaction also +memory +info +bgrewriteaof ({said})"
            ))
        } else if is(&["READONLY"]) {
            server(format!(
                "this is a read-only replica; give the primary's address ({said})"
            ))
        } else if is(&["MOVED", "ASK", "CROSSSLOT"]) {
            server(format!(
                "this is one node of a cluster, and the memory belongs to another one; a store needs one server, or a proxy that shows \
                 the cluster as one ({said})"
            ))
        } else if is(&["WRONGTYPE"]) {
            let what = format!(
                "a key under its prefix holds no hash, so something else wrote it ({said}); another ?prefix= keeps the two apart"
            );
            let place = place.to_owned();
            Self::new(Fate::Refused, Error::NotAStore { place, what })
        } else if is(&["LOADING"]) {
            Self::unavailable(place, Fate::Early, "the server is still loading its data")
        } else if is(&["BUSY", "TRYAGAIN", "MASTERDOWN", "CLUSTERDOWN"]) {
            Self::unavailable(place, Fate::Early, said)
        } else {
            Self::unavailable(place, Fate::Refused, said)
        }
    }
}

fn credentials(said: &str) -> String {
    format!(
        "it wants another user name or password; give them as redis://user:password@host, or redis://:password@host where there is no \
         user ({said})"
    )
}

/// What is wrong with a connection's TLS, if that is what broke it.
fn tls(error: &RedisError) -> Option<String> {
    let source = std::error::Error::source(error)?;
    // The crate gives its own counted pointer as the source.
    let source = source
        .downcast_ref::<Arc<dyn std::error::Error + Send + Sync>>()
        .map_or(source, |inner| inner.as_ref());
    let io = source.downcast_ref::<std::io::Error>()?;
    let tls = io.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(format!(
        "TLS failed ({tls}); check that the server speaks it on this port, and give the authority of its certificate as ?ca=FILE"
    ))
}
