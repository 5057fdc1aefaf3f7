//! The address of a server: `redis://[user:password@]host[:port][/database][?parameters]`, and what may stand in it.

use std::path::Path;
use std::time::Duration;

use redis::{Client, ClientTlsConfig, IntoConnectionInfo, TlsCertificates};

use crate::error::{Error, shortened};

/// What keys begin with when the address does not say.
const PREFIX: &str = "deltamem:";

const EXPECTED: &str = "expected redis://[user:password@]host[:port][/database][?parameters], or rediss:// for TLS; a password's special \
                        characters are written as %XX";

/// A parsed address. It holds the password, so it is never printed.
pub(super) struct Address {
    /// Where to connect, and as whom.
    pub client: Client,
    /// The address as messages show it: without user and password.
    pub place: String,
    /// What every key begins with.
    pub prefix: String,
    /// How long one call may take, getting a connection included.
    pub timeout: Duration,
    /// How many connections there may be.
    pub connections: usize,
    /// How many replicas must have a change before it is acknowledged.
    pub replicas: u32,
}

impl Address {
    /// Reads an address.
    ///
    /// # Errors
    /// [`Error::Server`] that names the part that is wrong, never the password.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let mut url = redis::parse_redis_url(text)
            .filter(|url| {
                matches!(url.scheme(), "redis" | "rediss" | "valkey" | "valkeys") && url.host_str().is_some()
            })
            .ok_or_else(|| Error::Server {
                place: "the store's address".into(),
                problem: format!("it names no Redis or Valkey server; {EXPECTED}"),
            })?;
        let secure = matches!(url.scheme(), "rediss" | "valkeys");
        let mut place = format!(
            "{}://{}:{}/{}",
            url.scheme(),
            url.host_str().unwrap_or_default(),
            url.port().unwrap_or(6379),
            match url.path().trim_matches('/') {
                "" => "0",
                database => database,
            }
        );
        let wrong = |problem: String| Error::Server {
            place: place.clone(),
            problem,
        };
        if url.fragment().is_some() {
            return Err(wrong(
                "the address has a part after `#`; certificates are always checked: give the authority's one as ?ca=FILE".into(),
            ));
        }

        let mut prefix = PREFIX.to_owned();
        let (mut timeout, mut connections, mut replicas) = (5000, 16, 0);
        let (mut ca, mut certificate, mut key) = (None, None, None);
        for (name, value) in url.query_pairs() {
            let number = |least: u32, most: u32| match value.parse::<u32>() {
                Ok(number) if (least..=most).contains(&number) => Ok(number),
                _ => Err(wrong(format!(
                    "the parameter {name} is {:?}, expected a number from {least} to {most}",
                    shortened(&value)
                ))),
            };
            match &*name {
                "prefix" => {
                    if value.len() > 128 || value.contains(|c: char| c.is_control() || c == '{' || c == '}') {
                        return Err(wrong(format!(
                            "the parameter prefix is {:?}, expected at most 128 bytes without braces and control characters",
                            shortened(&value)
                        )));
                    }
                    value.as_ref().clone_into(&mut prefix);
                }
                "timeout_ms" => timeout = number(10, 600_000)?,
                "pool" => connections = number(1, 1024)?,
                "wait" => replicas = number(0, 100)?,
                "ca" => ca = Some(pem(&place, &value)?),
                "cert" => certificate = Some(pem(&place, &value)?),
                "key" => key = Some(pem(&place, &value)?),
                _ => {
                    return Err(wrong(format!(
                        "the parameter {:?} is not known; there are prefix, timeout_ms, pool, wait, ca, cert and key",
                        shortened(&name)
                    )));
                }
            }
        }
        if certificate.is_some() != key.is_some() {
            return Err(wrong(
                "a client's certificate needs its key: give both cert=FILE and key=FILE".into(),
            ));
        }
        if !secure && (ca.is_some() || certificate.is_some()) {
            return Err(wrong(
                "the address gives certificates without TLS; write rediss:// in front".into(),
            ));
        }

        url.set_query(None);
        let certificates = TlsCertificates {
            client_tls: certificate
                .zip(key)
                .map(|(client_cert, client_key)| ClientTlsConfig {
                    client_cert,
                    client_key,
                }),
            root_cert: ca,
        };
        let client = client(url, &certificates)
            .map_err(|error| wrong(format!("the address cannot be used ({error}); {EXPECTED}")))?;
        if prefix != PREFIX {
            place = format!("{place}?prefix={}", prefix.escape_debug());
        }
        Ok(Self {
            client,
            place,
            prefix,
            timeout: Duration::from_millis(timeout.into()),
            connections: connections as usize,
            replicas,
        })
    }
}

/// What connects. `CLIENT SETINFO` is left out: it would wait for two answers more.
fn client(url: impl IntoConnectionInfo, certificates: &TlsCertificates) -> redis::RedisResult<Client> {
    let info = url.into_connection_info()?;
    let settings = info.redis_settings().clone().set_skip_set_lib_name();
    let info = info.set_redis_settings(settings);
    if certificates.client_tls.is_none() && certificates.root_cert.is_none() {
        Client::open(info)
    } else {
        Client::build_with_tls(info, certificates.clone())
    }
}

/// The bytes of a certificate's or key's file.
fn pem(place: &str, path: &str) -> Result<Vec<u8>, Error> {
    std::fs::read(Path::new(path)).map_err(|error| Error::Server {
        place: place.to_owned(),
        problem: format!("the file {path:?} that the address names cannot be read ({error})"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(text: &str) -> String {
        match Address::parse(text) {
            Err(error) => error.to_string(),
            Ok(address) => panic!("{} was taken", address.place),
        }
    }

    #[test]
    fn an_address_says_where_as_whom_and_how_long() {
        let address = Address::parse(
            "redis://ann:s%40crit@memory.example:7000/3?prefix=bots:&timeout_ms=250&pool=2&wait=1",
        )
        .unwrap();
        assert_eq!(address.place, "redis://memory.example:7000/3?prefix=bots:");
        assert_eq!((address.prefix.as_str(), address.connections), ("bots:", 2));
        assert_eq!(
            (address.timeout, address.replicas),
            (Duration::from_millis(250), 1)
        );
        let settings = address.client.get_connection_info().redis_settings().clone();
        assert_eq!((settings.db(), settings.username()), (3, Some("ann")));
        assert_eq!(settings.password(), Some("s@crit"));
        let plain = Address::parse("valkeys://[::1]").unwrap();
        assert_eq!(
            (plain.place.as_str(), plain.prefix.as_str()),
            ("valkeys://[::1]:6379/0", PREFIX)
        );
    }

    #[test]
    fn a_wrong_address_is_refused_by_name_and_without_its_password() {
        for (text, part) in [
            ("redis//:hunter2@host", "names no Redis"),
            ("http://u:hunter2@host", "names no Redis"),
            ("redis://u:hunter2@host:port", "names no Redis"),
            ("redis://u:hunter2@host/zero", "database"),
            ("redis://u:hunter2@host?timeout_ms=never", "timeout_ms"),
            ("redis://u:hunter2@host?timeout_ms=0", "from 10"),
            ("redis://u:hunter2@host?pool=0", "pool"),
            ("redis://u:hunter2@host?prefix=%7Ba%7D", "prefix"),
            ("redis://u:hunter2@host?retries=9", "not known"),
            ("rediss://u:hunter2@host#insecure", "ca=FILE"),
            ("redis://u:hunter2@host?ca=Cargo.toml", "rediss://"),
            ("rediss://u:hunter2@host?ca=nowhere.pem", "nowhere.pem"),
            ("rediss://u:hunter2@host?cert=Cargo.toml", "key"),
        ] {
            let problem = problem(text);
            assert!(problem.contains(part), "{text}: {problem}");
            assert!(!problem.contains("hunter2"), "{problem}");
        }
    }
}
