//! The text of one request, as far as it may be shown.
//!
//! Joins the detokenizer and the stop strings. The engine's output thread feeds it each token that
//! belongs to the text; a token that ended the request by its id it does not.

use nano_core::ids::TokenId;

use crate::detokenizer::IncrementalDetokenizer;
use crate::error::{Error, Result};
use crate::stop::{StopMatcher, TextStep};
use crate::tokenizer::Tokenizer;

/// How a request's tokens become text; names and defaults are vLLM's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextOptions {
    /// Strings that end the text.
    pub stop: Vec<String>,
    /// Whether the stop string found is part of the text.
    pub include_stop_str_in_output: bool,
    /// Whether special tokens have no text.
    pub skip_special_tokens: bool,
    /// The text of that many tokens is not searched: a stop string is one that begins after it.
    pub min_tokens: u32,
}

impl Default for TextOptions {
    fn default() -> Self {
        Self {
            stop: Vec::new(),
            include_stop_str_in_output: false,
            skip_special_tokens: true,
            min_tokens: 0,
        }
    }
}

/// Turns the tokens of one request into text up to its stop string.
#[derive(Clone, Debug)]
pub struct TextDecoder {
    /// Without one the request has no text.
    detokenizer: Option<IncrementalDetokenizer>,
    matcher: StopMatcher,
    /// Tokens whose text is not searched, and which are still to come.
    num_unsearched: u32,
}

impl TextDecoder {
    /// Continues the prompt's text; its last tokens are enough.
    ///
    /// # Errors
    /// [`Error::EmptyStop`], or [`Error::StopWithoutTokenizer`] if there are stop strings that
    /// could never be found.
    pub fn new(
        tokenizer: Option<Tokenizer>,
        prompt: &[TokenId],
        options: &TextOptions,
    ) -> Result<Self> {
        if tokenizer.is_none() && !options.stop.is_empty() {
            return Err(Error::StopWithoutTokenizer { num_stops: options.stop.len() });
        }
        Ok(Self {
            matcher: StopMatcher::new(&options.stop, options.include_stop_str_in_output)?,
            detokenizer: tokenizer
                .map(|it| IncrementalDetokenizer::new(it, prompt, options.skip_special_tokens))
                .transpose()?,
            num_unsearched: options.min_tokens,
        })
    }

    /// Takes the next token. Once a stop string was found, there is no more text.
    pub fn push(&mut self, token: TokenId) -> Result<TextStep> {
        let Some(detokenizer) = self.detokenizer.as_mut().filter(|_| !self.matcher.is_stopped())
        else {
            return Ok(TextStep::default());
        };
        let text = detokenizer.push(token)?;
        if self.num_unsearched > 0 {
            self.num_unsearched -= 1;
            return Ok(TextStep { text, stopped: None });
        }
        Ok(self.matcher.push(&text))
    }

    /// The rest of the text, when no token is to follow; call it once.
    pub fn finish(&mut self) -> Result<TextStep> {
        let Some(mut detokenizer) = self.detokenizer.take().filter(|_| !self.matcher.is_stopped())
        else {
            return Ok(TextStep::default());
        };
        let text = detokenizer.finish()?;
        if self.num_unsearched > 0 {
            return Ok(TextStep { text, stopped: None });
        }
        let mut step = self.matcher.push(&text);
        if step.stopped.is_none() {
            step.text += &self.matcher.flush();
        }
        Ok(step)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fixture;

    fn run(text: &str, options: &TextOptions) -> (String, Option<String>) {
        let tokenizer = fixture::byte_level();
        let tokens = tokenizer.encode(text, false).unwrap();
        let mut decoder = TextDecoder::new(Some(tokenizer), &[], options).unwrap();
        let mut steps: Vec<_> = tokens.iter().map(|&token| decoder.push(token).unwrap()).collect();
        steps.push(decoder.finish().unwrap());
        let shown = steps.iter().map(|step| step.text.as_str()).collect();
        (shown, steps.into_iter().find_map(|step| step.stopped))
    }

    fn options(stop: &[&str], min_tokens: u32) -> TextOptions {
        let stop = stop.iter().map(ToString::to_string).collect();
        TextOptions { stop, min_tokens, ..TextOptions::default() }
    }

    #[test]
    fn a_stop_string_across_tokens_and_inside_one_is_found() {
        assert_eq!(
            run("a 你好 hell b", &options(&["好 h"], 0)),
            ("a 你".into(), Some("好 h".into()))
        );
        assert_eq!(run("hello", &options(&["el"], 0)), ("h".into(), Some("el".into())));
    }

    #[test]
    fn text_held_for_a_stop_string_comes_at_the_end() {
        assert_eq!(run("abc", &options(&["bcd"], 0)), ("abc".into(), None));
    }

    #[test]
    fn a_stop_string_counts_only_after_min_tokens() {
        // One token a letter.
        assert_eq!(run("abab", &options(&["ab"], 0)), (String::new(), Some("ab".into())));
        assert_eq!(run("abab", &options(&["ab"], 1)), ("ab".into(), Some("ab".into())));
        assert_eq!(run("abab", &options(&["ab"], 2)), ("ab".into(), Some("ab".into())));
        assert_eq!(run("abab", &options(&["ab"], 3)), ("abab".into(), None));
        assert_eq!(run("abab", &options(&["ab"], 9)), ("abab".into(), None));
    }

    #[test]
    fn the_rest_of_a_text_is_searched_only_after_min_tokens() {
        let tokenizer = fixture::byte_level();
        let half_a_character = tokenizer.token_to_id("½").unwrap();
        for (min_tokens, stopped) in [(1, Some("\u{fffd}")), (2, None)] {
            let options = options(&["\u{fffd}"], min_tokens);
            let mut decoder = TextDecoder::new(Some(tokenizer.clone()), &[], &options).unwrap();
            assert_eq!(decoder.push(half_a_character).unwrap(), TextStep::default());
            assert_eq!(decoder.finish().unwrap().stopped.as_deref(), stopped);
        }
    }

    #[test]
    fn without_a_tokenizer_there_is_no_text_and_no_stop_string() {
        let mut decoder = TextDecoder::new(None, &[], &TextOptions::default()).unwrap();
        assert_eq!(decoder.push(TokenId(7)).unwrap(), TextStep::default());
        assert_eq!(decoder.finish().unwrap(), TextStep::default());
        let error = TextDecoder::new(None, &[], &options(&["a"], 0)).unwrap_err();
        assert_eq!(error.code(), "invalid_sampling_params");
    }

    proptest! {
        #![proptest_config(fixture::fixed_seed())]

        #[test]
        fn the_text_ends_where_the_first_stop_string_of_the_whole_is(
            text in "[ab好 ]{0,12}", stop in "[ab好 ]{1,3}", include: bool,
        ) {
            let mut options = options(&[&stop], 0);
            options.include_stop_str_in_output = include;
            let expected = match text.find(&stop) {
                Some(at) if include => (text[..at + stop.len()].to_owned(), Some(stop)),
                Some(at) => (text[..at].to_owned(), Some(stop)),
                None => (text.clone(), None),
            };
            prop_assert_eq!(run(&text, &options), expected);
        }
    }
}
