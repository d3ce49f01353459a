//! How much text a token can stand for: a bound of a prompt's tokens before it is encoded.

use serde_json::Value;
use tokenizers::models::ModelWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// The most bytes of text behind one token, `None` unless it is certain: on the way to the
/// vocabulary no text may be dropped or get shorter, and no unknown one may become a single token.
pub(crate) fn max_token_bytes(tokenizer: &tokenizers::Tokenizer) -> Option<usize> {
    let ModelWrapper::BPE(model) = tokenizer.get_model() else { return None };
    if model.continuing_subword_prefix.is_some() || model.end_of_word_suffix.is_some() {
        return None;
    }
    let normalizer = serde_json::to_value(tokenizer.get_normalizer()).ok()?;
    let splitter = serde_json::to_value(tokenizer.get_pre_tokenizer()).ok()?;
    let last = splitter["pretokenizers"].as_array().and_then(|all| all.last()).unwrap_or(&splitter);
    // Added tokens are looked for in the text alone.
    let vocabulary = tokenizer.get_vocab(false);
    let every_byte_has_a_token = if model.byte_fallback {
        (0..=255).all(|byte: u8| vocabulary.contains_key(&format!("<0x{byte:02X}>")))
    } else {
        last["type"] == "ByteLevel"
            && ByteLevel::alphabet().iter().all(|byte| vocabulary.contains_key(&byte.to_string()))
    };
    let added_is_plain = tokenizer
        .get_added_tokens_decoder()
        .values()
        .all(|token| !token.lstrip && !token.rstrip && (!token.normalized || normalizer.is_null()));
    let is_certain = keeps_text(&normalizer)
        && keeps_text(&splitter)
        && every_byte_has_a_token
        && added_is_plain;
    let longest = tokenizer.get_vocab(true).keys().map(String::len).max();
    longest.filter(|_| is_certain)
}

/// Whether a normalizer or pre-tokenizer is known to leave at least as many bytes as it gets.
fn keeps_text(part: &Value) -> bool {
    match part["type"].as_str() {
        None => part.is_null(),
        Some("Prepend" | "Metaspace" | "ByteLevel" | "Digits") => true,
        Some("Split") => part["behavior"] != "Removed",
        Some("Replace") => {
            let (from, to) = (part["pattern"]["String"].as_str(), part["content"].as_str());
            from.zip(to).is_some_and(|(from, to)| from.len() <= to.len())
        }
        Some("Sequence") => ["normalizers", "pretokenizers"]
            .iter()
            .all(|name| part[name].as_array().is_none_or(|all| all.iter().all(keeps_text))),
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::fixture;
    use crate::tokenizer::Tokenizer;

    const TEXTS: &str = r"([ hel]|<s>|<tool>|<\|end\|>|你|好|\PC){0,60}";

    proptest! {
        #![proptest_config(fixture::fixed_seed())]

        #[test]
        fn no_text_has_fewer_tokens_than_its_bound(text in TEXTS) {
            for tokenizer in [fixture::byte_level(), fixture::metaspace()] {
                let least = tokenizer.min_num_tokens(text.len());
                prop_assert!(text.is_empty() || least > 0);
                prop_assert!(tokenizer.encode(&text, false).unwrap().len() >= least);
            }
        }
    }

    #[test]
    fn the_longest_token_counts() {
        assert_eq!(fixture::byte_level().min_num_tokens(70), 10, "<|end|> has 7 bytes");
        assert_eq!(fixture::metaspace().min_num_tokens(61), 11, "<0x0A> and ▁▁ have 6");
    }

    #[test]
    fn a_tokenizer_that_may_shorten_text_has_no_bound() {
        let shortens: [(&str, Value); 9] = [
            ("/normalizer", json!({ "type": "NFKC" })),
            ("/normalizer", json!({ "type": "Strip", "strip_left": true, "strip_right": true })),
            (
                "/normalizer/normalizers/1",
                json!({ "type": "Replace", "pattern": { "Regex": " +" }, "content": "▁" }),
            ),
            (
                "/normalizer/normalizers/1",
                json!({ "type": "Replace", "pattern": { "String": "    " }, "content": "▁" }),
            ),
            ("/pre_tokenizer", json!({ "type": "WhitespaceSplit" })),
            (
                "/pre_tokenizer",
                json!({
                    "type": "Split", "pattern": { "String": " " }, "behavior": "Removed",
                    "invert": false
                }),
            ),
            ("/model/byte_fallback", json!(false)),
            ("/model/end_of_word_suffix", json!("</w>")),
            ("/added_tokens/2/rstrip", json!(true)),
        ];
        for (place, value) in shortens {
            let mut json: Value = serde_json::from_str(&fixture::metaspace_json()).unwrap();
            json["pre_tokenizer"] = Value::Null;
            let (parent, key) = place.rsplit_once('/').unwrap();
            match json.pointer_mut(parent).unwrap() {
                Value::Array(parts) => parts[key.parse::<usize>().unwrap()] = value,
                parts => parts[key] = value,
            }
            let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
            assert_eq!(tokenizer.min_num_tokens(1 << 40), 0, "{place}");
        }
    }
}
