//! A Redis or Valkey server that a test starts for itself: on a free port, in a temporary directory, gone when the test ends. And a relay
//! before it that cuts connections.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Where the server's program is; `None`, with the reason printed, where there is none.
pub fn program() -> Option<&'static Path> {
    static FOUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOUND
        .get_or_init(|| {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let found = ["redis-server", "valkey-server"].iter().find_map(|name| {
                std::env::split_paths(&path)
                    .map(|folder| folder.join(name))
                    .find(|file| file.is_file())
            });
            if found.is_none() {
                eprintln!(
                    "skipped: neither redis-server nor valkey-server is in PATH; `apt-get install redis-server` brings one"
                );
            }
            found
        })
        .as_deref()
}

/// A running server.
pub struct Server {
    child: Child,
    options: Vec<String>,
    /// Where it listens.
    pub port: u16,
    /// Where its files are.
    pub folder: tempfile::TempDir,
}

impl Server {
    /// Starts one with these options; `None` where there is no program. `{port}` and `{folder}` in an option stand for its own; a server
    /// that says nothing of `{port}` listens there without TLS.
    pub fn start(options: &[&str]) -> Option<Self> {
        program()?;
        let folder = tempfile::tempdir().unwrap();
        // Somebody else may take the port between the question and the start.
        for _ in 0..20 {
            let port = free_port();
            let mut all: Vec<String> = [
                "--bind",
                "127.0.0.1",
                "--dir",
                "{folder}",
                "--logfile",
                "{folder}/log",
                "--save",
                "",
            ]
            .iter()
            .chain(options)
            .map(|option| {
                option
                    .replace("{port}", &port.to_string())
                    .replace("{folder}", folder.path().to_str().unwrap())
            })
            .collect();
            if !options.iter().any(|option| option.contains("{port}")) {
                all.extend(["--port".to_owned(), port.to_string()]);
            }
            let mut child = spawn(&all);
            if answers(&mut child, port) {
                return Some(Self {
                    child,
                    options: all,
                    port,
                    folder,
                });
            }
            let log = std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
            assert!(
                log.contains("in use"),
                "the server did not start with {all:?}:\n{log}"
            );
        }
        panic!("no free port was found");
    }

    /// Kills it as a power cut would, without a word.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again on the same port and folder.
    pub fn restart(&mut self) {
        self.child = spawn(&self.options);
        assert!(
            answers(&mut self.child, self.port),
            "the server did not start again"
        );
    }

    /// Its address without user, password and parameters.
    pub fn address(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Runs a command on a connection of its own, beside the backend.
    pub fn tell<T: redis::FromRedisValue>(&self, command: &[&[u8]]) -> T {
        let client = redis::Client::open(self.address()).unwrap();
        let mut connection = client.get_connection().unwrap();
        let mut told = redis::Cmd::new();
        for part in command {
            told.arg(*part);
        }
        told.query(&mut connection).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

fn spawn(options: &[String]) -> Child {
    Command::new(program().unwrap())
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Waits until it takes connections; false when it ended instead.
fn answers(child: &mut Child, port: u16) -> bool {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        let taken = TcpStream::connect(("127.0.0.1", port)).is_ok();
        // What answers is ours only if ours lives on: two cannot have the port.
        if taken {
            std::thread::sleep(Duration::from_millis(10));
        }
        match child.try_wait().unwrap() {
            Some(_) => return false,
            None if taken => return true,
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    panic!("the server did not start within 20 seconds");
}

/// Which way bytes go through a relay.
#[derive(Clone, Copy)]
pub enum Way {
    Request,
    Answer,
}

/// When a relay cuts: after so many bytes one way, once or each time that many have passed.
#[derive(Clone, Copy)]
struct Cut {
    left: usize,
    again: Option<usize>,
}

/// Stands before a server, passes everything on, and cuts the connection where it is told to.
pub struct Relay {
    pub port: u16,
    cuts: Arc<[Mutex<Option<Cut>>; 2]>,
    made: Arc<AtomicUsize>,
}

impl Relay {
    pub fn before(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = Self {
            port: listener.local_addr().unwrap().port(),
            cuts: Arc::default(),
            made: Arc::default(),
        };
        let (cuts, made) = (relay.cuts.clone(), relay.made.clone());
        // The thread waits for connections until the test's process ends.
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.unwrap();
                let Ok(server) = TcpStream::connect(("127.0.0.1", server)) else {
                    continue;
                };
                client.set_nodelay(true).unwrap();
                server.set_nodelay(true).unwrap();
                for way in [Way::Request, Way::Answer] {
                    let (client, server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                    let (cuts, made) = (cuts.clone(), made.clone());
                    std::thread::spawn(move || match way {
                        Way::Request => pass(client, server, &cuts[0], &made),
                        Way::Answer => pass(server, client, &cuts[1], &made),
                    });
                }
            }
        });
        relay
    }

    /// Cuts once, when the byte after the next `bytes` would pass.
    pub fn cut(&self, way: Way, bytes: usize) {
        *self.cuts[way as usize].lock().unwrap() = Some(Cut {
            left: bytes,
            again: None,
        });
    }

    /// Cuts every time.
    pub fn keep_cutting(&self, way: Way, bytes: usize) {
        *self.cuts[way as usize].lock().unwrap() = Some(Cut {
            left: bytes,
            again: Some(bytes),
        });
    }

    /// Passes everything again.
    pub fn mend(&self) {
        for cut in &*self.cuts {
            *cut.lock().unwrap() = None;
        }
    }

    /// How often it has cut.
    pub fn made(&self) -> usize {
        self.made.load(Ordering::SeqCst)
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, cut: &Mutex<Option<Cut>>, made: &AtomicUsize) {
    let mut buffer = vec![0; 65536];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        let passing = {
            let mut cut = cut.lock().unwrap();
            match &mut *cut {
                None => None,
                Some(now) if now.left >= read => {
                    now.left -= read;
                    None
                }
                Some(now) => {
                    let passing = now.left;
                    *cut = now.again.map(|left| Cut {
                        left,
                        again: Some(left),
                    });
                    made.fetch_add(1, Ordering::SeqCst);
                    Some(passing)
                }
            }
        };
        let written = to.write_all(&buffer[..passing.unwrap_or(read)]);
        if passing.is_some() || written.is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
