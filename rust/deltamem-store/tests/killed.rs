//! A process that writes is killed with SIGKILL at random moments: every commit that it told of is there afterwards, no half one is, and
//! the store opens at once and is clean. The child is this test's own binary, run again.

#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod suite;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use deltamem_store::backend::redb::{RedbBackend, RedbOptions};
use deltamem_store::{GcOptions, Options, Store};
use suite::memories::{commit, sealed};
use suite::workload::Dice;

const PLACE: &str = "DELTAMEM_STORE_KILLED";
const SESSIONS: u64 = 4;

fn open(path: &Path) -> Store {
    let backend = RedbBackend::open(path, RedbOptions::default()).unwrap();
    let options = Options {
        key: sealed().key,
        ..Options::default()
    };
    Store::open(Arc::new(backend), options).unwrap()
}

/// The child: sessions commit for ever, and tell of each commit once it is acknowledged; now and then everything is written anew.
/// Without its variable it is no child, and has nothing to do.
#[test]
fn child() {
    let Ok(path) = std::env::var(PLACE) else {
        return;
    };
    let store = open(Path::new(&path));
    let told = Mutex::new(std::io::stdout());
    std::thread::scope(|scope| {
        for session in 0..SESSIONS {
            let (store, told) = (&store, &told);
            scope.spawn(move || {
                let name = format!("session {session}");
                for n in 0.. {
                    let made = commit(store, &name, n);
                    let mut out = told.lock().unwrap();
                    writeln!(out, "\ncommitted {session} {} {}", made.id, made.generation).unwrap();
                    out.flush().unwrap();
                    drop(out);
                    if session == 0 && n % 40 == 20 {
                        let gc = GcOptions {
                            reflog_ms: 60_000,
                            compact: true,
                        };
                        store.gc(&gc).unwrap();
                    }
                }
            });
        }
    });
}

/// Kills the child `times` times over one store; the commits acknowledged in all.
fn kill(times: u64) -> usize {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memories");
    let mut dice = Dice(7);
    let mut acknowledged: BTreeMap<u64, Vec<(String, u64)>> = BTreeMap::new();
    let (mut slowest, mut all) = (Duration::ZERO, 0);
    for round in 0..times {
        // Some are killed while the file is being made.
        if round % 10 == 9 {
            acknowledged.clear();
            std::fs::remove_file(&path).unwrap();
        }
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env(PLACE, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let reader = std::thread::spawn(move || {
            let lines = lines.map_while(Result::ok);
            lines
                .filter(|line| line.starts_with("committed "))
                .collect::<Vec<_>>()
        });
        // From before the file exists to some hundred commits later.
        std::thread::sleep(Duration::from_micros(if round % 5 == 4 {
            dice.roll(20_000)
        } else {
            5_000 + dice.roll(150_000)
        }));
        child.kill().unwrap();
        let ended = child.wait_with_output().unwrap();
        let words = String::from_utf8_lossy(&ended.stderr);
        assert!(!words.contains("panicked"), "round {round}: {words}");
        let lines = reader.join().unwrap();
        all += lines.len();
        for line in &lines {
            // The last line may be cut.
            let mut parts = line.split(' ').skip(1);
            if let (Some(session), Some(id), Some(generation)) = (parts.next(), parts.next(), parts.next())
                && let (Ok(session), Ok(generation)) = (session.parse(), generation.parse())
                && id.len() == 64
            {
                acknowledged
                    .entry(session)
                    .or_default()
                    .push((id.to_owned(), generation));
            }
        }

        let began = Instant::now();
        let store = open(&path);
        slowest = slowest.max(began.elapsed());
        let report = store.verify().unwrap();
        assert_eq!(report.damages, [], "round {round}");
        for (session, commits) in &acknowledged {
            let name = format!("session {session}");
            let log = store.log(&name, &["main"], usize::MAX).unwrap();
            assert_eq!(
                log.len() as u64,
                log[0].generation,
                "round {round}: one chain without holes"
            );
            let there: BTreeMap<String, u64> = log
                .iter()
                .map(|commit| (commit.id.to_string(), commit.generation))
                .collect();
            let last = commits.iter().map(|(_, generation)| *generation).max().unwrap();
            for (id, generation) in commits {
                // The last digits of a line that was cut may be missing; its id is whole.
                assert!(
                    there.contains_key(id),
                    "round {round}: commit {generation} of {name} was acknowledged and is lost"
                );
            }
            // A session has one commit under way: at most that one is there without being told of, and this in each round.
            assert!(log[0].generation >= last, "round {round}");
            store.checkout(&name, "main").unwrap();
        }
        // What was there without being told of counts from now on.
        for session in 0..SESSIONS {
            let name = format!("session {session}");
            let told = acknowledged.entry(session).or_default();
            let known = told.len() as u64;
            let made = store.info(&name).map_or(0, |info| info.usage.commits);
            assert!(
                made <= known + 1,
                "round {round}: {made} commits of {name}, {known} were told of"
            );
            if made > known {
                let head = store.show(&name, "main").unwrap();
                told.push((head.id.to_string(), head.generation));
            } else if made == 0 {
                acknowledged.remove(&session);
            }
        }
        store.close().unwrap();
    }
    println!("{all} commits acknowledged before {times} kills, opened afterwards in at most {slowest:?}");
    all
}

#[test]
fn twenty_five_kills_lose_nothing() {
    let commits = kill(25);
    assert!(commits > 50, "only {commits} commits were made between the kills");
}

#[test]
#[ignore = "long"]
fn five_hundred_kills_lose_nothing() {
    let commits = kill(500);
    assert!(
        commits > 1_000,
        "only {commits} commits were made between the kills"
    );
}
