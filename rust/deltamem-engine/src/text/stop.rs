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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scanner(stops: &[&str]) -> StopScanner {
        StopScanner::new(stops.iter().map(|&stop| stop.to_owned()).collect())
    }

    /// Pushes the pieces; returns what came out and whether a stop text came.
    fn scan(scanner: &mut StopScanner, pieces: &[&str]) -> (String, bool) {
        let mut out = String::new();
        for piece in pieces {
            match scanner.push(piece) {
                StopScan::Text(text) => out.push_str(&text),
                StopScan::Stopped(text) => return (out + &text, true),
            }
        }
        (out + &scanner.finish(), false)
    }

    /// The definition, character by character: stop as soon as the text ends with a stop text, the longest such.
    fn naive(stops: &[String], text: &str) -> (String, bool) {
        for (at, character) in text.char_indices() {
            let so_far = &text[..at + character.len_utf8()];
            let longest = stops
                .iter()
                .filter(|stop| so_far.ends_with(*stop))
                .map(String::len)
                .max();
            if let Some(longest) = longest {
                return (so_far[..so_far.len() - longest].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    proptest! {
        #[test]
        fn any_cut_into_pieces_stops_where_the_definition_does(
            text in "[abcé]{0,40}",
            stops in prop::collection::vec("[abcé]{1,5}", 0..4),
            cuts in prop::collection::vec(0..40_usize, 0..10),
        ) {
            let mut starts: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
            starts.push(text.len());
            let mut ends: Vec<usize> = cuts.iter().map(|cut| starts[cut % starts.len()]).chain([text.len()]).collect();
            ends.sort_unstable();
            let pieces: Vec<&str> = ends.iter().zip([0].iter().chain(&ends)).map(|(&to, &from)| &text[from..to]).collect();

            let found = scan(&mut StopScanner::new(stops.clone()), &pieces);
            prop_assert_eq!(&found, &naive(&stops, &text));
            prop_assert_eq!(found.1, stops.iter().any(|stop| text.contains(stop.as_str())));
        }
    }

    #[test]
    fn a_stop_text_may_span_pieces_and_nothing_of_it_comes_out() {
        assert_eq!(
            scan(&mut scanner(&["\nUser:"]), &["Hello", "\n", "Us", "er", ": hi"]),
            ("Hello".into(), true)
        );
    }

    #[test]
    fn only_what_may_become_a_stop_text_is_held() {
        let mut scanner = scanner(&["</s>", "END"]);
        assert_eq!(scanner.push("a </"), StopScan::Text("a ".into()));
        assert_eq!(scanner.push("s"), StopScan::Text(String::new()));
        assert_eq!(scanner.push("b E"), StopScan::Text("</sb ".into()));
        assert_eq!(scanner.finish(), "E");
    }

    #[test]
    fn after_a_stop_text_everything_is_swallowed() {
        let mut scanner = scanner(&["."]);
        assert_eq!(scanner.push("a.b"), StopScan::Stopped("a".into()));
        assert_eq!(scanner.push("c"), StopScan::Stopped(String::new()));
        assert_eq!(scanner.finish(), "");
    }

    #[test]
    fn without_stop_texts_all_comes_out_at_once() {
        let mut scanner = scanner(&["", ""]);
        assert_eq!(scanner.push("abc"), StopScan::Text("abc".into()));
        assert_eq!(scanner.finish(), "");
    }
}
