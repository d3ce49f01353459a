//! Stop strings in a text that arrives in pieces.
//!
//! Each stop string has its own Knuth-Morris-Pratt automaton, so that every byte is looked at
//! once, however the text is cut, and the state says how much of a stop string the text ends with.

use std::mem;

use crate::error::{Error, Result};

/// What one more token, or the end, adds to a request's text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextStep {
    /// Text that nothing that follows can take back; often empty.
    pub text: String,
    /// The stop string found, once; no text comes after it.
    pub stopped: Option<String>,
}

/// Finds the first stop string of a text and cuts the text there.
///
/// The first is the one that ends first, and of those that end together the one listed first. So
/// the answer does not depend on how the text was cut; vLLM, which searches a token's text for one
/// stop string after the other, answers the same unless two of them end within one token.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    automata: Vec<Automaton>,
    include_stop_str_in_output: bool,
    /// The end of the text, as long as it may still turn out to begin a stop string.
    held: String,
    is_stopped: bool,
}

impl StopMatcher {
    /// Cuts the text before the stop string, or after it if `include_stop_str_in_output`; then
    /// text need not be held back.
    ///
    /// # Errors
    /// [`Error::EmptyStop`] if a stop string is empty.
    pub fn new(stop: &[String], include_stop_str_in_output: bool) -> Result<Self> {
        if let Some(position) = stop.iter().position(String::is_empty) {
            return Err(Error::EmptyStop { position });
        }
        Ok(Self {
            automata: stop.iter().map(|stop| Automaton::new(stop)).collect(),
            include_stop_str_in_output,
            held: String::new(),
            is_stopped: false,
        })
    }

    /// Takes the next piece of the text and gives what is now safe to show. After a match it takes
    /// and gives nothing.
    pub fn push(&mut self, piece: &str) -> TextStep {
        if self.is_stopped {
            return TextStep::default();
        }
        let piece_start = self.held.len();
        self.held.push_str(piece);
        for (index, byte) in piece.bytes().enumerate() {
            // Every automaton takes every byte up to a match, and nothing is asked of one after.
            let matched = self.automata.iter_mut().position(|automaton| automaton.push(byte));
            if let Some(matched) = matched {
                let stop = mem::take(&mut self.automata[matched].stop);
                let end = piece_start + index + 1;
                self.held.truncate(if self.include_stop_str_in_output {
                    end
                } else {
                    end - stop.len()
                });
                self.is_stopped = true;
                return TextStep { text: mem::take(&mut self.held), stopped: Some(stop) };
            }
        }
        let num_held = if self.include_stop_str_in_output {
            0
        } else {
            self.automata.iter().map(|automaton| automaton.num_matched).max().unwrap_or(0)
        };
        // A stop string begins with the first byte of a character, so the cut falls between two.
        let held = self.held.split_off(self.held.len() - num_held);
        TextStep { text: mem::replace(&mut self.held, held), stopped: None }
    }

    /// The text still held back, at the end of the whole.
    pub fn flush(&mut self) -> String {
        self.automata.iter_mut().for_each(|automaton| automaton.num_matched = 0);
        mem::take(&mut self.held)
    }

    /// Whether a stop string was found.
    pub fn is_stopped(&self) -> bool {
        self.is_stopped
    }
}

#[derive(Clone, Debug)]
struct Automaton {
    stop: String,
    /// `border[i]` is the length of the longest proper prefix of `stop[..=i]` that also ends it.
    border: Vec<usize>,
    /// The length of the longest prefix of `stop` that the text ends with.
    num_matched: usize,
}

impl Automaton {
    fn new(stop: &str) -> Self {
        // Fed with its own tail, the automaton finds its borders; a shorter one never needs a
        // longer one's.
        let mut automaton = Self { stop: stop.into(), border: vec![0], num_matched: 0 };
        for byte in stop.bytes().skip(1) {
            automaton.push(byte);
            automaton.border.push(automaton.num_matched);
        }
        automaton.num_matched = 0;
        automaton
    }

    /// Whether the text, with this byte, ends with the stop string.
    fn push(&mut self, byte: u8) -> bool {
        let stop = self.stop.as_bytes();
        while self.num_matched > 0 && stop[self.num_matched] != byte {
            self.num_matched = self.border[self.num_matched - 1];
        }
        if stop[self.num_matched] == byte {
            self.num_matched += 1;
        }
        self.num_matched == stop.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fixture;

    fn strings(stop: &[&str]) -> Vec<String> {
        stop.iter().map(ToString::to_string).collect()
    }

    /// The text that is shown and the stop string, found by looking at every end of the whole.
    fn oracle(text: &str, stop: &[String], include: bool) -> (String, Option<String>) {
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            if let Some(stop) = stop.iter().find(|stop| text[..end].ends_with(stop.as_str())) {
                let shown = if include { end } else { end - stop.len() };
                return (text[..shown].into(), Some(stop.clone()));
            }
        }
        (text.into(), None)
    }

    #[test]
    fn a_stop_string_across_pieces_is_cut_off() {
        let mut matcher = StopMatcher::new(&strings(&["END"]), false).unwrap();
        assert_eq!(matcher.push("one E").text, "one ");
        assert_eq!(matcher.push("N").text, "");
        let step = matcher.push("D two");
        assert_eq!(step, TextStep { text: String::new(), stopped: Some("END".into()) });
        assert_eq!(matcher.push("three"), TextStep::default());
        assert_eq!(matcher.flush(), "");
        assert!(matcher.is_stopped());
    }

    #[test]
    fn an_included_stop_string_is_shown_without_holding_text_back() {
        let mut matcher = StopMatcher::new(&strings(&["END"]), true).unwrap();
        assert_eq!(matcher.push("one E").text, "one E");
        let step = matcher.push("ND two");
        assert_eq!(step, TextStep { text: "ND".into(), stopped: Some("END".into()) });
    }

    #[test]
    fn the_stop_string_that_ends_first_wins_and_then_the_one_listed_first() {
        let found =
            |stop: &[&str], text: &str| StopMatcher::new(&strings(stop), false).unwrap().push(text);
        assert_eq!(found(&["abcd", "bc"], "xabcd").stopped.as_deref(), Some("bc"));
        assert_eq!(found(&["c", "bc"], "abc").text, "ab");
        assert_eq!(found(&["bc", "c"], "abc").text, "a");
    }

    #[test]
    fn an_empty_stop_string_is_refused() {
        let error = StopMatcher::new(&strings(&["a", ""]), false).unwrap_err();
        assert_eq!(error.to_string(), "stop must hold no empty string, got one at position 1");
    }

    proptest! {
        #![proptest_config(fixture::fixed_seed())]

        #[test]
        fn every_cutting_agrees_with_a_search_of_the_whole(
            // `é` and `è` share their first byte.
            pieces in prop::collection::vec("[abéè]{0,4}", 0..12),
            stop in prop::collection::vec("[abéè]{1,5}", 0..4),
            include: bool,
        ) {
            let whole = pieces.concat();
            let mut matcher = StopMatcher::new(&stop, include).unwrap();
            let (mut shown, mut seen, mut stopped) = (String::new(), String::new(), None);
            for piece in &pieces {
                let step = matcher.push(piece);
                prop_assert!(stopped.is_none() || step == TextStep::default());
                shown += &step.text;
                seen += piece;
                stopped = stopped.or(step.stopped);
                // Held back is the longest end that begins a stop string, and no more.
                if stopped.is_none() && !include {
                    let begins =
                        |end: &str| stop.iter().any(|it| it != end && it.starts_with(end));
                    let mut ends = seen.char_indices().map(|(at, _)| &seen[at..]);
                    let held = ends.find(|end| begins(end)).unwrap_or("");
                    prop_assert_eq!(format!("{shown}{held}"), seen.clone());
                }
            }
            shown += &matcher.flush();
            prop_assert_eq!((shown, stopped), oracle(&whole, &stop, include));
        }
    }
}
