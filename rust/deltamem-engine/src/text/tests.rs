#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

/// The character that byte-level tokenizers write for a byte (GPT-2's table).
fn letter(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&other| !printable(other)).count();
    char::from_u32(256 + u32::try_from(before).unwrap()).unwrap()
}

fn special(id: usize, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
}

/// Byte-level BPE: id = byte below 256, a few merges (one of half a character), then two special tokens.
fn byte_level() -> Text {
    let mut vocab: Map<String, Value> = (0..=255_u8)
        .map(|byte| (letter(byte).to_string(), json!(byte)))
        .collect();
    let merge = |left: &[u8], right: &[u8]| {
        [left, right].map(|bytes| bytes.iter().map(|&byte| letter(byte)).collect::<String>())
    };
    let merges = [
        merge(b"h", b"e"),
        merge(b"l", b"l"),
        merge(b" ", b"t"),
        merge("é".as_bytes().split_at(1).0, "é".as_bytes().split_at(1).1),
        // The space and the first two bytes of an emoji in one token.
        merge(&[0xF0], &[0x9F]),
        merge(b" ", &[0xF0, 0x9F]),
        // U+FFFD itself, whole.
        merge(&[0xEF], &[0xBF]),
        merge(&[0xEF, 0xBF], &[0xBD]),
    ];
    for (index, pair) in merges.iter().enumerate() {
        vocab.insert(pair.concat(), json!(256 + index));
    }
    let next = vocab.len();
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    from_json(&json!({
        "version": "1.0", "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
        "added_tokens": [special(next, "<|im_start|>"), special(next + 1, "<|im_end|>")],
        "normalizer": null, "pre_tokenizer": bytes, "decoder": bytes,
        "post_processor": {
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [next], "tokens": ["<|im_start|>"]}}
        },
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": merges}
    }))
}

/// In the manner of Llama 2: spaces are `▁`, what no token covers is spelled in `<0xNN>`, the first space is stripped.
fn byte_fallback() -> Text {
    let mut vocab = Map::new();
    let pieces = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter();
    let pieces = pieces.chain((0..=255_u8).map(|byte| format!("<0x{byte:02X}>")));
    let pieces = pieces.chain(["▁", "a", "b", "é", "."].map(str::to_owned));
    for piece in pieces {
        let id = vocab.len();
        vocab.insert(piece, json!(id));
    }
    let id = vocab.len();
    vocab.insert("▁a".into(), json!(id));
    from_json(&json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocab, "merges": [["▁", "a"]]}
    }))
}

fn from_json(tokenizer: &Value) -> Text {
    Text::from_bytes(tokenizer.to_string().as_bytes()).unwrap()
}

/// Pushes all ids; returns the pieces, the last from `finish`.
fn pieces(text: &Text, ids: &[i32]) -> Vec<String> {
    let mut stream = text.stream();
    let mut pieces = Vec::new();
    for &id in ids {
        let piece = stream.push(id).unwrap();
        assert_ne!(piece.as_deref(), Some(""));
        pieces.extend(piece);
        assert!(stream.pending.len() <= MOST_WITHOUT_TEXT && stream.context.len() <= MOST_WITHOUT_TEXT);
    }
    pieces.push(stream.finish());
    pieces
}

proptest! {
    #[test]
    fn pieces_put_together_are_the_decoded_text_whatever_the_ids(ids in prop::collection::vec(0..270_i32, 0..40)) {
        let text = byte_level();
        prop_assert_eq!(pieces(&text, &ids).concat(), text.decode(&ids, true).unwrap());
    }

    #[test]
    fn bytes_that_are_hardly_ever_utf8_still_flow(
        ids in prop::collection::vec(prop_oneof![Just(0xEF), Just(0xBF), Just(0xBD), Just(0xF0), Just(0x9F), Just(0xC3), Just(0x41), Just(263)], 0..60),
    ) {
        let text = byte_level();
        prop_assert_eq!(pieces(&text, &ids).concat(), text.decode(&ids, true).unwrap());
        // No more waits than the bytes of one character.
        let mut stream = text.stream();
        for &id in &ids {
            stream.push(id).unwrap();
            prop_assert!(stream.pending.len() <= LONGEST_CHARACTER, "{} ids wait", stream.pending.len());
        }
    }

    #[test]
    fn any_text_survives_encoding_and_streaming(string in "\\PC{0,20}|[ aé.\u{FFFD}🦀hel t]{0,30}") {
        let text = byte_level();
        let ids = text.encode(&string, false).unwrap();
        prop_assert_eq!(text.decode(&ids, false).unwrap(), string.clone());
        prop_assert_eq!(pieces(&text, &ids).concat(), string);
    }

    #[test]
    fn byte_fallback_streams_what_it_decodes(string in "[ ab.é€🦀漢字]{0,20}") {
        let text = byte_fallback();
        let ids = text.encode(&string, false).unwrap();
        let streamed = pieces(&text, &ids);
        prop_assert_eq!(streamed.concat(), text.decode(&ids, true).unwrap());
        prop_assert_eq!(streamed.concat(), string);
    }

    #[test]
    fn byte_fallback_gives_text_for_any_ids_and_never_waits_for_ever(ids in prop::collection::vec(0..264_i32, 0..60)) {
        let text = byte_fallback();
        pieces(&text, &ids);
    }
}

#[test]
fn a_character_split_over_tokens_waits_for_its_last_one() {
    let text = byte_level();
    let ids: Vec<i32> = "né🦀".bytes().map(i32::from).collect();
    let mut stream = text.stream();
    let out: Vec<Option<String>> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    let expected = [Some("n"), None, Some("é"), None, None, None, Some("🦀")];
    assert_eq!(out, expected.map(|piece| piece.map(str::to_owned)));
    assert_eq!(stream.finish(), "");
}

#[test]
fn what_is_left_of_a_character_comes_out_at_the_end() {
    let text = byte_level();
    let mut stream = text.stream();
    assert_eq!(stream.push(0xE2).unwrap(), None);
    assert_eq!(stream.push(0x82).unwrap(), None);
    assert_eq!(stream.finish(), "\u{FFFD}");
    // And the stream is as new.
    assert_eq!(stream.push(i32::from(b'a')).unwrap().as_deref(), Some("a"));
}

#[test]
fn a_text_of_replacement_characters_is_not_held_for_ever() {
    let text = byte_level();
    let ids = text.encode(&"\u{FFFD}".repeat(1000), false).unwrap();
    assert_eq!(ids, vec![263; 1000]);
    let mut stream = text.stream();
    let mut length = 0;
    for (index, &id) in ids.iter().enumerate() {
        length += stream.push(id).unwrap().map_or(0, |piece| piece.chars().count());
        assert!(
            index + 1 - length <= LONGEST_CHARACTER,
            "after {} tokens {length} characters are out",
            index + 1
        );
    }
    assert_eq!(length + stream.finish().chars().count(), 1000);
}

#[test]
fn special_tokens_are_recognised_in_text_and_added_only_when_asked_for() {
    let text = byte_level();
    let (start, end) = (
        text.token_to_id("<|im_start|>").unwrap(),
        text.token_to_id("<|im_end|>").unwrap(),
    );
    assert_eq!(
        text.encode("<|im_start|>a<|im_end|>", false).unwrap(),
        [start, i32::from(b'a'), end]
    );
    assert_eq!(text.encode("a", true).unwrap(), [start, i32::from(b'a')]);
    assert_eq!(text.decode(&[start, i32::from(b'a'), end], true).unwrap(), "a");
    assert_eq!(
        text.decode(&[start, i32::from(b'a'), end], false).unwrap(),
        "<|im_start|>a<|im_end|>"
    );
    assert_eq!(text.token_to_id("nothing of the kind"), None);
}

#[test]
fn a_file_s_truncation_and_padding_do_not_touch_texts() {
    let text = byte_level();
    assert_eq!(text.encode("abcdef", false).unwrap().len(), 6);
    assert_eq!(text.encode("a", false).unwrap().len(), 1);
}

#[test]
fn ids_that_no_token_has_give_no_text() {
    let text = byte_level();
    let ids = [i32::from(b'a'), -1, i32::MAX, 100_000, i32::from(b'b')];
    assert_eq!(text.decode(&ids, false).unwrap(), "ab");
    assert_eq!(pieces(&text, &ids).concat(), "ab");
}

#[test]
fn special_tokens_between_words_do_not_cost_a_space() {
    let text = byte_fallback();
    let (a, space_a, end) = (text.token_to_id("a").unwrap(), text.token_to_id("▁a").unwrap(), 2);
    let ids = [space_a, end, space_a, a, end, end, space_a];
    assert_eq!(text.decode(&ids, true).unwrap(), "a aa a");
    assert_eq!(pieces(&text, &ids).concat(), "a aa a");
}

#[test]
fn what_is_no_tokenizer_is_an_error() {
    for bytes in [
        &b""[..],
        b"{}",
        b"null",
        b"\xFF\xFE",
        br#"{"version":"1.0","model":{"type":"BPE"}}"#,
    ] {
        assert!(matches!(
            Text::from_bytes(bytes),
            Err(TextError::Tokenizer { .. })
        ));
    }
}
