//! Text from one token after another.
//!
//! What a token adds to the text depends on its neighbours: it may end inside a character, and
//! some decoders strip the space of the first word. So each token is decoded in a window that also
//! holds the tokens just before it, and what the window's text had before is taken off. The window
//! moves along and never grows beyond a limit: the whole output is not decoded again.

use nano_core::ids::TokenId;

use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// Tokens that may wait for the end of a character. A character takes at most four; it is more
/// because an output may hold U+FFFD as text, which looks like one that has not ended.
const MAX_HELD_TOKENS: usize = 32;

/// The window's tokens once they are more than that; the last character begins within them.
const NUM_KEPT_TOKENS: usize = 8;

/// Prompt tokens tried as the first window.
const MAX_CONTEXT_TOKENS: usize = 24;

const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Decodes a growing sequence of tokens piece by piece; a piece is whole characters.
///
/// The pieces joined are what decoding the tokens together gives, with one exception: where a
/// model writes byte tokens that are no UTF-8, the decoder of Llama's kind spoils all characters
/// of that run of byte tokens, and the pieces only those that were not complete.
#[derive(Clone, Debug)]
pub struct IncrementalDetokenizer {
    tokenizer: Tokenizer,
    skip_special_tokens: bool,
    window: Vec<u32>,
    /// `window[..num_context]` ended with a character, and its text was given out.
    num_context: usize,
    /// The text of the window that was given out.
    emitted: String,
}

impl IncrementalDetokenizer {
    /// Continues the text of `context`, the prompt's tokens; without any, the text begins here and
    /// loses its leading space if that is what the tokenizer does.
    pub fn new(
        tokenizer: Tokenizer,
        context: &[TokenId],
        skip_special_tokens: bool,
    ) -> Result<Self> {
        let start = context_start(&tokenizer, context, skip_special_tokens)?;
        let mut detokenizer = Self {
            tokenizer,
            skip_special_tokens,
            window: Vec::new(),
            num_context: 0,
            emitted: String::new(),
        };
        for &token in &context[start..] {
            detokenizer.push(token)?;
        }
        Ok(detokenizer)
    }

    /// The text that this token completes; often a word, and empty inside a character.
    pub fn push(&mut self, token: TokenId) -> Result<String> {
        if !self.tokenizer.is_decoded(token, self.skip_special_tokens) {
            return Ok(String::new());
        }
        self.window.push(token.0);
        let mut text = self.decode(&self.window)?;
        if !text.starts_with(&self.emitted) {
            // A byte token that completes no character turns those of its whole run to U+FFFD.
            // The ones before were complete: it is decoded without them.
            self.window.drain(..self.num_context);
            self.num_context = 0;
            self.emitted.clear();
            text = self.decode(&self.window)?;
        }
        let is_complete = !text.ends_with(REPLACEMENT);
        let is_full = self.window.len() - self.num_context > MAX_HELD_TOKENS;
        let stable = if is_complete {
            text.as_str()
        } else if is_full {
            // An incomplete character is one U+FFFD; the ones before it will stay.
            text.strip_suffix(REPLACEMENT).unwrap_or(&text)
        } else {
            text.trim_end_matches(REPLACEMENT)
        };
        let piece = stable.get(self.emitted.len()..).unwrap_or_default().to_owned();
        self.emitted.push_str(&piece);
        if is_complete {
            self.window.drain(..self.num_context);
            self.num_context = self.window.len();
            self.emitted = self.decode(&self.window)?;
        } else if is_full {
            self.window.drain(..self.window.len() - NUM_KEPT_TOKENS);
            self.num_context = 0;
            let text = self.decode(&self.window)?;
            text.strip_suffix(REPLACEMENT).unwrap_or(&text).clone_into(&mut self.emitted);
        }
        Ok(piece)
    }

    /// The rest of the text: an incomplete character as U+FFFD. The text ends here.
    pub fn finish(&mut self) -> Result<String> {
        let text = self.decode(&self.window)?;
        let piece = text.get(self.emitted.len()..).unwrap_or_default().to_owned();
        self.window.clear();
        self.num_context = 0;
        self.emitted.clear();
        Ok(piece)
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode_ids(ids, self.skip_special_tokens)
    }
}

/// Where the shortest end of the prompt begins that holds whole characters, the last of which the
/// output may complete.
fn context_start(
    tokenizer: &Tokenizer,
    context: &[TokenId],
    skip_special_tokens: bool,
) -> Result<usize> {
    let first = context.len().saturating_sub(MAX_CONTEXT_TOKENS);
    for num_incomplete in 0..=3 {
        let end = context.len().saturating_sub(num_incomplete);
        for start in (first..end).rev() {
            let text = tokenizer.decode(&context[start..end], skip_special_tokens)?;
            if !text.is_empty() && !text.contains(REPLACEMENT) {
                return Ok(start);
            }
        }
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;
    use crate::fixture;

    const MAX_WINDOW: usize = 65;

    fn pieces(detokenizer: &mut IncrementalDetokenizer, tokens: &[TokenId]) -> Vec<String> {
        let mut pieces = Vec::new();
        for &token in tokens {
            pieces.push(detokenizer.push(token).unwrap());
            assert!(detokenizer.window.len() <= MAX_WINDOW);
        }
        pieces.push(detokenizer.finish().unwrap());
        pieces
    }

    fn start(tokenizer: &Tokenizer, context: &[TokenId]) -> IncrementalDetokenizer {
        IncrementalDetokenizer::new(tokenizer.clone(), context, true).unwrap()
    }

    fn tokenizer() -> impl Strategy<Value = Tokenizer> {
        prop_oneof![Just(fixture::byte_level()), Just(fixture::metaspace())]
    }

    /// Letters with merges, spaces, CJK, emoji of one and of several characters, combining marks.
    fn text() -> impl Strategy<Value = String> {
        let part = prop_oneof![
            "[hel ]{1,4}",
            "[你好]{1,9}",
            "[ 😀]{1,3}",
            Just("👩‍👩‍👧".to_owned()),
            "(e\u{301}|\u{fe0f}|ß|\n)",
            any::<char>().prop_map(String::from),
        ];
        prop::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
    }

    proptest! {
        #![proptest_config(fixture::fixed_seed())]

        #[test]
        fn the_pieces_of_a_text_joined_are_the_text(tokenizer in tokenizer(), text in text()) {
            let tokens = tokenizer.encode(&text, true).unwrap();
            let whole = tokenizer.decode(&tokens, true).unwrap();
            let pieces = pieces(&mut start(&tokenizer, &[]), &tokens);
            prop_assert_eq!(pieces.concat(), whole.clone());
            // Only an incomplete character, or what looks like one, may wait for the end.
            if !whole.contains(REPLACEMENT) {
                prop_assert_eq!(pieces.last().unwrap(), "");
            }
        }

        #[test]
        fn a_continued_text_is_the_rest_of_the_whole(
            tokenizer in tokenizer(), text in text(), at: prop::sample::Index,
        ) {
            let tokens = tokenizer.encode(&text, true).unwrap();
            let at = at.index(tokens.len() + 1);
            let whole = pieces(&mut start(&tokenizer, &[]), &tokens);
            let rest = pieces(&mut start(&tokenizer, &tokens[..at]), &tokens[at..]);
            prop_assert_eq!(rest.concat(), whole[at..].concat());
        }

        #[test]
        fn any_tokens_of_a_byte_level_vocabulary_give_the_whole(
            // Of all tokens and, so that many in a row are broken, of few bytes.
            ids in prop_oneof![
                prop::collection::vec(0_u32..266, 0..99),
                prop::collection::vec(select(vec![0xa0, 0xbd, 0xe4, 0xf0, 261]), 0..200),
            ],
            skip: bool,
        ) {
            let tokenizer = fixture::byte_level();
            let tokens: Vec<_> = ids.into_iter().map(TokenId).collect();
            let mut it = IncrementalDetokenizer::new(tokenizer.clone(), &[], skip).unwrap();
            let pieces = pieces(&mut it, &tokens);
            prop_assert_eq!(pieces.concat(), tokenizer.decode(&tokens, skip).unwrap());
        }

        #[test]
        fn any_tokens_of_a_byte_fallback_vocabulary_give_the_whole_but_for_broken_bytes(
            // `<0xE4>`, `<0xBD>`, `<0xA0>` and any others but ASCII bytes.
            ids in prop::collection::vec(
                prop_oneof![0_u32..3, 131_u32..300, Just(231), Just(192), Just(163)], 0..99,
            ),
        ) {
            let tokenizer = fixture::metaspace();
            let tokens: Vec<_> = ids.into_iter().map(TokenId).collect();
            let whole = tokenizer.decode(&tokens, true).unwrap();
            let joined = pieces(&mut start(&tokenizer, &[]), &tokens).concat();
            if !whole.contains(REPLACEMENT) {
                prop_assert_eq!(&joined, &whole);
            }
            let ascii = |text: &str| text.chars().filter(char::is_ascii).collect::<String>();
            prop_assert_eq!(ascii(&joined), ascii(&whole));
        }
    }

    #[test]
    fn a_leading_space_is_kept_after_a_prompt_only() {
        let tokenizer = fixture::metaspace();
        let tokens = tokenizer.encode("hell", true).unwrap();
        assert_eq!(pieces(&mut start(&tokenizer, &[]), &tokens).concat(), "hell");
        assert_eq!(pieces(&mut start(&tokenizer, &tokens), &tokens).concat(), " hell");
    }

    #[test]
    fn of_a_prompt_only_its_last_characters_are_decoded_again() {
        let tokenizer = fixture::byte_level();
        let tokens = tokenizer.encode(&"hell ".repeat(100), false).unwrap();
        assert_eq!(start(&tokenizer, &tokens).window.len(), 1);
    }

    #[test]
    fn a_character_is_given_as_soon_as_it_is_complete() {
        let tokenizer = fixture::byte_level();
        let tokens = tokenizer.encode(" 😀你好", false).unwrap();
        let pieces = pieces(&mut start(&tokenizer, &[]), &tokens);
        // Tokens: ` F0 9F`, `98`, `80`, `E4`, `BD`, `A0 E5`, `A5`, `BD`.
        assert_eq!(pieces, [" ", "", "😀", "", "", "你", "", "好", ""]);
    }

    #[test]
    fn long_texts_that_never_end_with_a_character_keep_a_small_window() {
        for (tokenizer, text) in [
            (fixture::byte_level(), "你好".repeat(500)),
            (fixture::byte_level(), "\u{fffd}".repeat(500)),
            (fixture::metaspace(), "好".repeat(500)),
            (fixture::metaspace(), "\u{fffd}".repeat(500)),
        ] {
            let tokens = tokenizer.encode(&text, false).unwrap();
            assert_eq!(pieces(&mut start(&tokenizer, &[]), &tokens).concat(), text);
        }
    }

    #[test]
    fn endless_tokens_without_text_or_with_broken_text_keep_a_small_window() {
        let broken = |tokenizer: &Tokenizer, token: &str| {
            let token = tokenizer.token_to_id(token).unwrap();
            pieces(&mut start(tokenizer, &[]), &[token; 500]).concat()
        };
        assert_eq!(broken(&fixture::byte_level(), "<|end|>"), "");
        assert_eq!(broken(&fixture::byte_level(), "½"), "\u{fffd}".repeat(500));
        assert_eq!(broken(&fixture::metaspace(), "<0xBD>"), "\u{fffd}".repeat(500));
        assert_eq!(broken(&fixture::metaspace(), "▁▁"), " ".repeat(999));
    }

    #[test]
    fn an_incomplete_character_ends_as_replacement_characters() {
        let bytes = |tokenizer: &Tokenizer, names: &[&str]| -> String {
            let tokens: Vec<_> =
                names.iter().map(|it| tokenizer.token_to_id(it).unwrap()).collect();
            pieces(&mut start(tokenizer, &[]), &tokens).concat()
        };
        assert_eq!(bytes(&fixture::byte_level(), &["a", "ä", "½"]), "a\u{fffd}");
        let tokenizer = fixture::metaspace();
        assert_eq!(bytes(&tokenizer, &["a", "<0xE4>", "<0xBD>"]), "a\u{fffd}\u{fffd}");
        // The whole decoded at once would lose 你 too.
        let broken = ["<0xE4>", "<0xBD>", "<0xA0>", "<0xBD>", "a"];
        assert_eq!(bytes(&tokenizer, &broken), "你\u{fffd}a");
    }

    #[test]
    fn special_tokens_are_text_only_when_not_skipped() {
        let tokenizer = fixture::byte_level();
        let tokens = tokenizer.encode("he<|end|><tool>ll", false).unwrap();
        let shown = |skip| {
            let mut it = IncrementalDetokenizer::new(tokenizer.clone(), &[], skip).unwrap();
            pieces(&mut it, &tokens).concat()
        };
        assert_eq!(shown(true), "he<tool>ll");
        assert_eq!(shown(false), "he<|end|><tool>ll");
    }
}
