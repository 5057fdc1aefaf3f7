//! Texts that end a reply. They may span pieces, so the end of what came so far is held back while it may be the beginning of one.
//! Works on characters; knows nothing of tokens.

/// Watches pieces of text for stop texts.
///
/// The first stop text that is complete ends the stream, the longest of those that are complete at the same character. How the text is
/// cut into pieces does not matter.
#[derive(Debug, Clone)]
pub struct StopScanner {
    stops: Vec<String>,
    /// The end of the text so far: it may become a stop text.
    held: String,
    stopped: bool,
}

/// What a piece of text leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopScan {
    /// The text that is certain by now; may be empty.
    Text(String),
    /// A stop text came. This is what stood before it, as far as it was not given out yet.
    Stopped(String),
}

impl StopScanner {
    /// A scanner for `stops`. Empty ones never stop anything: callers who take stop texts from outside should refuse them.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        Self {
            stops,
            held: String::new(),
            stopped: false,
        }
    }

    /// Takes the next piece. After a stop text everything is swallowed.
    pub fn push(&mut self, piece: &str) -> StopScan {
        if self.stopped {
            return StopScan::Stopped(String::new());
        }
        self.held.push_str(piece);
        if let Some(start) = self.first_stop() {
            self.stopped = true;
            let mut before = std::mem::take(&mut self.held);
            before.truncate(start);
            return StopScan::Stopped(before);
        }
        let certain = self.held.len() - self.possible_beginning();
        let rest = self.held.split_off(certain);
        StopScan::Text(std::mem::replace(&mut self.held, rest))
    }

    /// The text that was held back, when no more pieces come.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the stop text that is complete first begins.
    fn first_stop(&self) -> Option<usize> {
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop).map(|start| (start + stop.len(), start)));
        found.min().map(|(_, start)| start)
    }

    /// Bytes at the end of `held` that may be the beginning of a stop text.
    fn possible_beginning(&self) -> usize {
        let longest = self.stops.iter().map(|stop| stop.len() - 1).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest);
        let begins = |start: &usize| {
            self.held
                .get(*start..)
                .is_some_and(|end| self.stops.iter().any(|stop| stop.starts_with(end)))
        };
        (from..self.held.len())
            .find(begins)
            .map_or(0, |start| self.held.len() - start)
    }
}
