//! Connections to one server: how many there may be, how long one may wait for one, and which are still good. A connection that
//! failed is never used again, and with it go the idle ones of its age: they lead to the same dead server.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use redis::{Cmd, Connection, Value};

use super::address::Address;
use super::failure::{Failure, Fate};

/// After this rest a connection is tried before it is used: servers and what stands between close idle ones.
const FRESH: Duration = Duration::from_secs(2);

/// The connections to one server.
pub(super) struct Pool {
    pub address: Address,
    state: Mutex<State>,
    freed: Condvar,
}

struct State {
    idle: Vec<(Connection, Instant)>,
    /// Connections in use or being opened.
    taken: usize,
    /// Counts the failures. What belongs to one server's life, as the cursor of a scan, holds within one generation.
    generation: u64,
    closed: bool,
    /// A forked process must not speak through its parent's connections.
    process: u32,
}

impl Pool {
    pub fn new(address: Address) -> Self {
        Self {
            address,
            state: Mutex::new(State {
                idle: Vec::new(),
                taken: 0,
                generation: 0,
                closed: false,
                process: std::process::id(),
            }),
            freed: Condvar::new(),
        }
    }

    /// A connection for one call that must end by `deadline`.
    pub fn lease(&self, deadline: Instant) -> Result<Lease<'_>, Failure> {
        let place = &self.address.place;
        let mut state = self.state.lock();
        if state.process != std::process::id() {
            state.process = std::process::id();
            state.idle.clear();
            state.taken = 0;
        }
        let rested = loop {
            if state.closed {
                return Err(Failure::unavailable(
                    place,
                    Fate::Refused,
                    "the store was closed; open it again",
                ));
            }
            if let Some(rested) = state.idle.pop() {
                break Some(rested);
            }
            if state.taken < self.address.connections {
                break None;
            }
            if self.freed.wait_until(&mut state, deadline).timed_out() {
                let reason = format!(
                    "all {} connections were in use for {:?}; ?pool= allows more of them",
                    self.address.connections, self.address.timeout
                );
                return Err(Failure::unavailable(place, Fate::Refused, reason));
            }
        };
        state.taken += 1;
        drop(state);
        // From here on the lease gives the place in the pool back, whatever happens.
        let mut lease = Lease {
            pool: self,
            connection: None,
            deadline,
            generation: 0,
        };
        if let Some((connection, since)) = rested {
            lease.connection = Some(connection);
            if since.elapsed() >= FRESH
                && let Err(failure) = lease.exchange(&[Cmd::ping()])
                && failure.fate == Fate::Silent
            {
                return Err(Failure {
                    fate: Fate::Refused,
                    ..failure
                });
            }
        }
        if lease.connection.is_none() {
            lease.connection = Some(self.open(deadline)?);
        }
        lease.generation = self.state.lock().generation;
        Ok(lease)
    }

    fn open(&self, deadline: Instant) -> Result<Connection, Failure> {
        let address = &self.address;
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Failure::late(
                &address.place,
                Fate::Refused,
                "no connection was made",
                address.timeout,
            ));
        }
        address.client.get_connection_with_timeout(left).map_err(|error| {
            let mut failure = Failure::of_connection(&address.place, &error, address.timeout);
            // Nothing was asked yet, so nothing was done.
            failure.fate = match failure.fate {
                Fate::Lost => Fate::Early,
                Fate::Silent => Fate::Refused,
                fate => fate,
            };
            failure
        })
    }

    /// A connection failed, and the idle ones with it.
    fn distrust(&self) {
        let idle = {
            let mut state = self.state.lock();
            state.generation += 1;
            std::mem::take(&mut state.idle)
        };
        drop(idle);
    }

    /// Waits for the calls under way, as long as one call may take, and closes what is idle.
    pub fn close(&self) {
        let deadline = Instant::now() + self.address.timeout;
        let mut state = self.state.lock();
        state.closed = true;
        self.freed.notify_all();
        while state.taken > 0 && !self.freed.wait_until(&mut state, deadline).timed_out() {}
        state.idle.clear();
    }
}

/// A connection in use. It goes back into the pool unless its last exchange failed.
pub(super) struct Lease<'a> {
    pool: &'a Pool,
    connection: Option<Connection>,
    deadline: Instant,
    /// The pool's generation when the connection was handed out.
    pub generation: u64,
}

impl Lease<'_> {
    /// Sends commands together and takes one answer for each: one round trip. Errors that the server answers with are among the
    /// answers.
    pub fn exchange(&mut self, commands: &[Cmd]) -> Result<Vec<Value>, Failure> {
        let mut bytes = Vec::new();
        for command in commands {
            command.write_packed_command(&mut bytes);
        }
        let address = &self.pool.address;
        // Taken out, so that it is dropped on every way out but the good one.
        let Some(mut connection) = self.connection.take() else {
            return Err(Failure::unavailable(
                &address.place,
                Fate::Early,
                "the connection broke before",
            ));
        };
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            self.connection = Some(connection);
            return Err(Failure::late(
                &address.place,
                Fate::Refused,
                "no connection was free",
                address.timeout,
            ));
        }
        let mut exchange = || {
            connection.set_write_timeout(Some(left))?;
            connection.set_read_timeout(Some(left))?;
            connection.send_packed_command(&bytes)?;
            (0..commands.len())
                .map(|_| {
                    if Instant::now() >= self.deadline {
                        return Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
                    }
                    connection.recv_response()
                })
                .collect()
        };
        match exchange() {
            Ok(answers) => {
                self.connection = Some(connection);
                Ok(answers)
            }
            Err(error) => {
                self.pool.distrust();
                let mut failure = Failure::of_connection(&address.place, &error, address.timeout);
                // The request was on its way, so nobody refused it for certain.
                if failure.fate == Fate::Refused {
                    failure.fate = Fate::Lost;
                }
                Err(failure)
            }
        }
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let mut state = self.pool.state.lock();
        // After a fork the count belongs to another process.
        state.taken = state.taken.saturating_sub(1);
        if let Some(connection) = self.connection.take()
            && !state.closed
            && state.generation == self.generation
        {
            state.idle.push((connection, Instant::now()));
        }
        drop(state);
        self.pool.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pool over a port that takes connections and says nothing: opening one asks nothing either.
    fn pool(listener: &std::net::TcpListener, connections: usize) -> Pool {
        let address = format!(
            "redis://{}?pool={connections}&timeout_ms=100",
            listener.local_addr().unwrap()
        );
        Pool::new(Address::parse(&address).unwrap())
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(100)
    }

    #[test]
    fn no_more_connections_are_made_than_allowed_and_the_wait_for_one_ends() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let pool = pool(&listener, 2);
        let first = pool.lease(soon()).ok().unwrap();
        let _second = pool.lease(soon()).ok().unwrap();
        let began = Instant::now();
        let failure = pool.lease(soon()).err().unwrap();
        assert!(began.elapsed() >= Duration::from_millis(90));
        assert!(
            failure.error.to_string().contains("all 2 connections"),
            "{}",
            failure.error
        );
        std::thread::scope(|scope| {
            scope.spawn(|| pool.lease(Instant::now() + Duration::from_secs(5)).ok().unwrap());
            std::thread::sleep(Duration::from_millis(20));
            drop(first);
        });
        assert_eq!(pool.state.lock().idle.len(), 1);
    }

    #[test]
    fn a_failure_takes_the_idle_connections_with_it() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let pool = pool(&listener, 3);
        let mut leases: Vec<_> = (0..3).map(|_| pool.lease(soon()).ok().unwrap()).collect();
        let mut failing = leases.remove(0);
        leases.remove(0);
        assert_eq!(pool.state.lock().idle.len(), 1);
        let failure = failing.exchange(&[Cmd::ping()]).unwrap_err();
        assert_eq!(failure.fate, Fate::Silent);
        assert_eq!(pool.state.lock().idle.len(), 0);
        // One that was handed out before the failure is not kept either.
        leases.clear();
        drop(failing);
        let state = pool.state.lock();
        assert_eq!((state.idle.len(), state.taken), (0, 0));
    }

    #[test]
    fn a_closed_pool_hands_nothing_out() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let pool = pool(&listener, 1);
        drop(pool.lease(soon()).ok().unwrap());
        pool.close();
        assert_eq!(pool.state.lock().idle.len(), 0);
        let failure = pool.lease(soon()).err().unwrap();
        assert!(failure.error.to_string().contains("was closed"));
    }
}
