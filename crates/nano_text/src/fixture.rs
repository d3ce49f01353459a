//! Two small tokenizers for the tests, of the two kinds that checkpoints have.

use proptest::test_runner::{Config, RngSeed};
use serde_json::{Map, Value, json};

use crate::tokenizer::Tokenizer;

/// The same cases in every run; `PROPTEST_CASES` sets how many.
pub(crate) fn fixed_seed() -> Config {
    Config { rng_seed: RngSeed::Fixed(20_260_101), failure_persistence: None, ..Config::default() }
}

/// GPT-2's and Llama 3's kind. One merge joins a space to half an emoji, and two the end of a CJK
/// character to the start of the next, so that in 你好你好… no token ends with a character.
pub(crate) fn byte_level() -> Tokenizer {
    let mut vocab = Map::new();
    for byte in 0..=255 {
        vocab.insert(spell(&[byte]), json!(byte));
    }
    let merges: [(&[u8], &[u8]); 7] = [
        (b" ", b"h"),
        (b"h", b"e"),
        (b"l", b"l"),
        (b"\xf0", b"\x9f"),
        (b" ", b"\xf0\x9f"),
        (b"\xa0", b"\xe5"),
        (b"\xbd", b"\xe4"),
    ];
    for (index, (left, right)) in merges.iter().enumerate() {
        vocab.insert(spell(&[*left, *right].concat()), json!(256 + index));
    }
    let merges: Vec<_> = merges.iter().map(|(left, right)| [spell(left), spell(right)]).collect();
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false
    });
    parse(&json!({
        "version": "1.0",
        "added_tokens": [added(263, "<|end|>", true), added(264, "<tool>", false)],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": { "type": "BPE", "vocab": vocab, "merges": merges },
    }))
}

/// Llama's and Mistral's kind: a space is `▁`, one is put before the text and stripped again, and
/// characters outside the vocabulary become byte tokens.
pub(crate) fn metaspace() -> Tokenizer {
    Tokenizer::from_bytes(metaspace_json().as_bytes()).unwrap()
}

pub(crate) fn metaspace_json() -> String {
    let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
    let pieces = ["<unk>", "<s>", "</s>"].map(String::from).into_iter().chain(bytes);
    let letters = ('a'..='z').map(String::from);
    let rest = ["▁", "▁h", "he", "ll", "▁▁", "你", "\u{fffd}"].map(String::from);
    let vocab: Map<_, _> = pieces
        .chain(letters)
        .chain(rest)
        .enumerate()
        .map(|(id, piece)| (piece, json!(id)))
        .collect();
    let merges = [["▁", "h"], ["h", "e"], ["l", "l"], ["▁", "▁"]];
    let with_bos = json!([
        { "SpecialToken": { "id": "<s>", "type_id": 0 } },
        { "Sequence": { "id": "A", "type_id": 0 } },
    ]);
    json!({
        "version": "1.0",
        "truncation": {
            "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
        },
        "padding": {
            "strategy": { "Fixed": 9 }, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"
        },
        "added_tokens": [added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true)],
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
        ] },
        "post_processor": {
            "type": "TemplateProcessing", "single": with_bos, "pair": with_bos,
            "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } }
        },
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" },
            { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
        ] },
        "model": {
            "type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>",
            "fuse_unk": true, "byte_fallback": true
        },
    })
    .to_string()
}

fn parse(json: &Value) -> Tokenizer {
    Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap()
}

fn added(id: u32, content: &str, special: bool) -> Value {
    json!({
        "id": id, "content": content, "special": special,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false
    })
}

/// How byte-level vocabularies spell bytes: printable ones as themselves, others from U+0100 on.
fn spell(bytes: &[u8]) -> String {
    let printable = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    bytes
        .iter()
        .map(|&byte| {
            if printable(byte) {
                return char::from(byte);
            }
            let index = (0..byte).filter(|&other| !printable(other)).count();
            char::from_u32(256 + index as u32).unwrap()
        })
        .collect()
}
