//! Messages and sentences: which span each token of a text or of a rendered conversation belongs to, for bundles whose memory writes one
//! mean a span. A token belongs to the span that it starts in. It knows text, templates and where tokens start; it knows nothing of
//! what is written.

use std::ops::Range;

use super::{ChatTemplate, Message, Text, TextError};
use crate::bundle::WriteGranularity;

/// A text's tokens and their spans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Token ids.
    pub ids: Vec<i32>,
    /// As many: the id of each token's span, never falling; -1 for a token of none.
    pub spans: Vec<i32>,
}

/// Where the sentences of a text begin, in bytes, ascending; the first at 0, none in an empty text.
///
/// A text is cut at two or more newlines, and at white space behind one of `. ! ? ; :` and the closing quotes or brackets directly
/// behind that. The white space begins the next sentence, so nothing is lost; where there is no next sentence it stays with the last.
pub fn sentences(text: &str) -> Vec<usize> {
    let mut starts: Vec<usize> = Vec::new();
    if !text.is_empty() {
        starts.push(0);
    }
    // Where the white space before the present place asks for a cut; the cut is made once words follow.
    let mut cut = None;
    let (mut ended, mut words) = (false, false);
    let mut characters = text.char_indices().peekable();
    while let Some((at, c)) = characters.next() {
        if is_space(c) {
            let two_newlines = c == '\n' && matches!(characters.peek(), Some((_, '\n')));
            if ended || two_newlines {
                cut.get_or_insert(at);
            }
            ended = false;
            continue;
        }
        if let Some(cut) = cut.take()
            && words
        {
            starts.push(cut);
        }
        words = true;
        ended = matches!(c, '.' | '!' | '?' | ';' | ':') || (ended && closes(c));
    }
    starts
}

/// The tokens of a text that stands for itself: in a message bundle it is one message, in a sentence bundle its sentences are the spans.
/// Tokens that the tokenizer puts around it (`add_special`) belong to none.
///
/// # Errors
/// [`TextError::Tokenizer`].
pub fn cut_text(
    tokenizer: &Text,
    text: &str,
    add_special: bool,
    granularity: WriteGranularity,
) -> Result<Cut, TextError> {
    let (ids, starts) = tokenizer.encode_with_starts(text, add_special)?;
    let spans = match granularity {
        WriteGranularity::Token | WriteGranularity::Message => {
            let all = 0..text.len();
            vec![all]
        }
        WriteGranularity::Sentence => pieces(text, 0),
    };
    Ok(Cut {
        spans: assign(&starts, &spans),
        ids,
    })
}

/// The tokens of a conversation, with the generation prompt behind it. In a message bundle the spans are all that each message adds to the
/// rendered template, in a sentence bundle the sentences of the messages' contents. System messages and the generation prompt are none.
///
/// # Errors
/// [`TextError::Template`] when the template refuses the messages; [`TextError::Spans`] when it renders them so that it cannot be told what
/// belongs to which.
pub fn cut_chat(
    tokenizer: &Text,
    template: &ChatTemplate,
    messages: &[Message],
    granularity: WriteGranularity,
) -> Result<Cut, TextError> {
    let rendered = template.render(messages, true)?;
    let mut spans: Vec<Range<usize>> = Vec::new();
    for (index, message) in messages.iter().enumerate() {
        if message.role == "system" {
            continue;
        }
        let added = added(template, messages, index, &rendered)?;
        match granularity {
            WriteGranularity::Token | WriteGranularity::Message => spans.push(added),
            WriteGranularity::Sentence => {
                let content = content(template, messages, index, &rendered, added)?;
                spans.extend(pieces(&rendered[content.clone()], content.start));
            }
        }
    }
    let (ids, starts) = tokenizer.encode_with_starts(&rendered, false)?;
    Ok(Cut {
        spans: assign(&starts, &spans),
        ids,
    })
}

/// The sentences of a text that begins at byte `at` of a larger one.
fn pieces(text: &str, at: usize) -> Vec<Range<usize>> {
    let starts = sentences(text);
    let ends = starts.iter().copied().skip(1).chain([text.len()]);
    starts
        .iter()
        .zip(ends)
        .map(|(start, end)| at + start..at + end)
        .collect()
}

/// The number of the span that each token starts in, -1 for none. Spans ascend; behind the last byte of the last span there may be
/// tokens without text of their own (a tokenizer that strips white space from its offsets), which belong to none.
fn assign(starts: &[Option<usize>], spans: &[Range<usize>]) -> Vec<i32> {
    let mut least = 0;
    starts
        .iter()
        .map(|start| {
            let Some(start) = *start else { return -1 };
            let number = spans.partition_point(|span| span.end <= start);
            match spans.get(number) {
                Some(span) if span.contains(&start) => {
                    // A normalizer may turn neighbours around; spans never fall.
                    least = least.max(i32::try_from(number).unwrap_or(i32::MAX));
                    least
                }
                _ => -1,
            }
        })
        .collect()
}

/// What the message at `index` adds to the rendered conversation.
fn added(
    template: &ChatTemplate,
    messages: &[Message],
    index: usize,
    rendered: &str,
) -> Result<Range<usize>, TextError> {
    let length = |count: usize| {
        if count == 0 {
            return Ok(0);
        }
        let beginning = template.render(&messages[..count], false)?;
        if rendered.starts_with(&beginning) {
            Ok(beginning.len())
        } else {
            Err(TextError::Spans(format!(
                "the chat template renders the first {count} of {} messages to {:.60?}, which is not how it begins the whole conversation \
                 ({:.60?})",
                messages.len(),
                shortened(&beginning, rendered),
                shortened(rendered, &beginning),
            )))
        }
    };
    let (start, end) = (length(index)?, length(index + 1)?);
    if end < start {
        return Err(TextError::Spans(format!(
            "the chat template renders {} messages longer than {}",
            index,
            index + 1
        )));
    }
    Ok(start..end)
}

/// The end of the part that both texts begin with, and what follows it in the first.
fn shortened<'a>(text: &'a str, other: &str) -> &'a str {
    let same: usize = text
        .chars()
        .zip(other.chars())
        .take_while(|(a, b)| a == b)
        .map(|(a, _)| a.len_utf8())
        .sum();
    let from = text[..same].char_indices().rev().nth(19).map_or(0, |(at, _)| at);
    &text[from..]
}

/// Where the content of the message at `index` stands in what it adds: as it is, else without the white space around it.
fn content(
    template: &ChatTemplate,
    messages: &[Message],
    index: usize,
    rendered: &str,
    added: Range<usize>,
) -> Result<Range<usize>, TextError> {
    let message = &messages[index];
    let text = &rendered[added.clone()];
    for form in [message.content.as_str(), message.content.trim()] {
        let mut places = text.match_indices(form).map(|(at, _)| at);
        let Some(first) = places.next() else { continue };
        let place = if form.is_empty() || places.next().is_none() {
            first
        } else {
            // A short message may be found inside what the template puts around it ("user"): ask where another one would stand.
            let probed = probe(template, messages, index, rendered, &added)?;
            probed.filter(|&at| text[at..].starts_with(form)).unwrap_or(first)
        };
        let start = added.start + place;
        return Ok(start..start + form.len());
    }
    Err(TextError::Spans(format!(
        "the chat template does not render the content of message {index} ({}, {:.60?}) as it is, nor without the white space around it",
        message.role, message.content
    )))
}

/// Where the template puts another content in the place of the message's, in bytes behind the start of what the message adds.
fn probe(
    template: &ChatTemplate,
    messages: &[Message],
    index: usize,
    rendered: &str,
    added: &Range<usize>,
) -> Result<Option<usize>, TextError> {
    const PROBE: &str = "\u{E0D1}\u{E0D2}\u{E0D3}";
    let mut changed = messages[..=index].to_vec();
    changed[index].content = PROBE.into();
    let other = template.render(&changed, false)?;
    let place = other.get(added.start..).and_then(|other| other.find(PROBE));
    // Only where both are the same up to there does the place say anything about the first.
    Ok(place.filter(|&place| {
        let end = added.start + place;
        other.as_bytes().get(..end) == rendered.as_bytes().get(..end) && rendered.is_char_boundary(end)
    }))
}

/// White space as Python's `\s` has it.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Closing quotes and brackets.
fn closes(c: char) -> bool {
    matches!(
        c,
        '"' | '\''
            | ')'
            | ']'
            | '}'
            | '\u{201d}'
            | '\u{2019}'
            | '\u{bb}'
            | '\u{203a}'
            | '\u{300d}'
            | '\u{300f}'
            | '\u{ff09}'
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn parts(text: &str) -> Vec<&str> {
        pieces(text, 0).into_iter().map(|range| &text[range]).collect()
    }

    #[test]
    fn sentences_are_cut_where_the_rule_says() {
        for (text, expected) in [
            ("", vec![]),
            ("One", vec!["One"]),
            (
                "One. Two! Three? Four; five: six",
                vec!["One.", " Two!", " Three?", " Four;", " five:", " six"],
            ),
            (
                "He said \"Go!\" (now.) \u{201c}Why?\u{201d} I went.",
                vec!["He said \"Go!\"", " (now.)", " \u{201c}Why?\u{201d}", " I went."],
            ),
            ("3.14 and a.b:c, e.g. this", vec!["3.14 and a.b:c, e.g.", " this"]),
            ("Wait... what?! Yes.", vec!["Wait...", " what?!", " Yes."]),
            (
                "a line\nanother\n\na paragraph\n\n\nand one",
                vec!["a line\nanother", "\n\na paragraph", "\n\n\nand one"],
            ),
            ("kept \n\nwith", vec!["kept ", "\n\nwith"]),
            ("One.\n\nTwo. \n\n Three", vec!["One.", "\n\nTwo.", " \n\n Three"]),
            (
                "One.\tTwo.\u{a0}Three.\u{3000}Four",
                vec!["One.", "\tTwo.", "\u{a0}Three.", "\u{3000}Four"],
            ),
            // White space with nothing in front or behind makes no sentence of its own.
            ("  \n\n One. ", vec!["  \n\n One. "]),
            ("One.\n\n", vec!["One.\n\n"]),
            (" \n\n ", vec![" \n\n "]),
            ("One. ) two", vec!["One.", " ) two"]),
            // A quote or bracket that closes nothing ended is part of the sentence.
            ("(a) b \"c\" d", vec!["(a) b \"c\" d"]),
            (
                "Gr\u{fc}\u{df}e! \u{1f600} Ja. \u{4f60}\u{597d}",
                vec!["Gr\u{fc}\u{df}e!", " \u{1f600} Ja.", " \u{4f60}\u{597d}"],
            ),
        ] {
            assert_eq!(parts(text), expected, "{text:?}");
        }
    }

    fn words() -> impl Strategy<Value = String> {
        prop::collection::vec(
            prop::sample::select(vec![
                "a",
                "Bruno",
                "\u{e9}t\u{e9}",
                "\u{1f600}",
                ".",
                "!",
                "?",
                ";",
                ":",
                "\"",
                ")",
                "]",
                " ",
                "  ",
                "\n",
                "\n\n",
                "\t",
                "\r\n",
                "\u{201d}",
                "\u{a0}",
            ]),
            0..40,
        )
        .prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn cutting_loses_no_character(text in prop_oneof![words(), any::<String>()]) {
            prop_assert_eq!(parts(&text).concat(), text.as_str());
            let starts = sentences(&text);
            prop_assert!(starts.is_sorted_by(|a, b| a < b));
            for part in parts(&text) {
                prop_assert!(text.trim().is_empty() || part.chars().any(|c| !is_space(c)), "{:?} in {:?}", part, text);
            }
        }

        #[test]
        fn every_token_belongs_to_the_sentence_that_it_starts_in(text in words(), gaps in prop::collection::vec(0..4_usize, 1..60)) {
            let spans = pieces(&text, 0);
            let mut at = 0;
            let mut starts = vec![None];
            for gap in gaps {
                at += gap;
                starts.push(Some(at));
            }
            let found = assign(&starts, &spans);
            prop_assert_eq!(found[0], -1);
            prop_assert!(found.iter().filter(|&&id| id >= 0).is_sorted());
            for (start, &id) in starts.iter().zip(&found).skip(1) {
                let start = start.unwrap();
                match usize::try_from(id) {
                    Ok(id) => prop_assert!(spans[id].contains(&start)),
                    Err(_) => prop_assert!(start >= text.len()),
                }
            }
        }
    }

    const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                            {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    fn messages(all: &[(&str, &str)]) -> Vec<Message> {
        all.iter()
            .map(|&(role, content)| Message {
                role: role.into(),
                content: content.into(),
            })
            .collect()
    }

    /// The text of each span, put together from one-byte tokens.
    fn chat(
        source: &str,
        all: &[(&str, &str)],
        granularity: WriteGranularity,
    ) -> Result<Vec<String>, TextError> {
        let template = ChatTemplate::new(source, "<s>", "</s>")?;
        let tokenizer = bytes_tokenizer();
        let cut = cut_chat(&tokenizer, &template, &messages(all), granularity)?;
        let rendered = template.render(&messages(all), true)?;
        assert_eq!(cut.ids.len(), cut.spans.len());
        assert_eq!(cut.ids.len(), rendered.len());
        assert!(cut.spans.iter().filter(|&&id| id >= 0).is_sorted());
        let mut spans: Vec<(i32, Vec<u8>)> = Vec::new();
        for (&id, byte) in cut.spans.iter().zip(rendered.bytes()) {
            match spans.last_mut() {
                _ if id < 0 => {}
                Some((last, bytes)) if *last == id => bytes.push(byte),
                _ => spans.push((id, vec![byte])),
            }
        }
        Ok(spans
            .into_iter()
            .map(|(_, bytes)| String::from_utf8(bytes).unwrap())
            .collect())
    }

    /// One token a byte, with offsets from the real thing.
    fn bytes_tokenizer() -> Text {
        bytes_tokenizer_with(&serde_json::Value::Null)
    }

    fn bytes_tokenizer_with(post_processor: &serde_json::Value) -> Text {
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let mut alphabet: Vec<char> = alphabet.into_iter().collect();
        alphabet.sort_unstable();
        let vocab: serde_json::Map<String, serde_json::Value> = alphabet
            .iter()
            .enumerate()
            .map(|(id, c)| (c.to_string(), id.into()))
            .collect();
        let file = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [
                {"id": 256, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}
            ], "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
            "post_processor": post_processor, "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                      "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": []}
        });
        Text::from_bytes(file.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn a_message_is_all_that_it_adds_and_system_and_generation_prompt_are_none() {
        use WriteGranularity::Message;
        assert_eq!(
            chat(
                TEMPLATE,
                &[
                    ("system", "Be brief."),
                    ("user", "Hi. You?"),
                    ("assistant", "\u{1f600}"),
                    ("user", "Ah")
                ],
                Message
            )
            .unwrap(),
            [
                "<|im_start|>user\nHi. You?<|im_end|>\n",
                "<|im_start|>assistant\n\u{1f600}<|im_end|>\n",
                "<|im_start|>user\nAh<|im_end|>\n"
            ]
        );
    }

    #[test]
    fn sentences_of_a_chat_are_the_contents_only() {
        use WriteGranularity::Sentence;
        assert_eq!(
            chat(
                TEMPLATE,
                &[
                    ("system", "Be. Brief."),
                    ("user", "J'\u{e9}tais l\u{e0}. Et toi?"),
                    ("assistant", "Ok")
                ],
                Sentence
            )
            .unwrap(),
            ["J'\u{e9}tais l\u{e0}.", " Et toi?", "Ok"]
        );
        // Content that stands in the template's own words too.
        for content in ["user", "s", "|", "im_end", "\n"] {
            assert_eq!(chat(TEMPLATE, &[("user", content)], Sentence).unwrap(), [content]);
        }
        let cut = cut_chat(
            &bytes_tokenizer(),
            &ChatTemplate::new(TEMPLATE, "", "").unwrap(),
            &messages(&[("user", "s")]),
            Sentence,
        )
        .unwrap();
        assert_eq!(
            cut.spans.iter().position(|&id| id == 0),
            Some("<|im_start|>user\n".len())
        );
        let none: [&str; 0] = [];
        assert_eq!(chat(TEMPLATE, &[("user", "")], Sentence).unwrap(), none);
    }

    #[test]
    fn a_template_that_trims_is_met_by_the_trimmed_content() {
        let trims = TEMPLATE.replace("m.content", "m.content | trim");
        assert_eq!(
            chat(&trims, &[("user", " \nOne. Two \n")], WriteGranularity::Sentence).unwrap(),
            ["One.", " Two"]
        );
    }

    #[test]
    fn a_template_that_cannot_be_taken_apart_is_an_error_that_says_so() {
        use WriteGranularity::{Message, Sentence};
        let upper = TEMPLATE.replace("m.content", "m.content | upper");
        let error = chat(&upper, &[("user", "hello")], Sentence).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("does not render the content of message 0 (user, \"hello\")"),
            "{error}"
        );
        assert!(chat(&upper, &[("user", "hello")], Message).is_ok());
        // The number of messages stands in front.
        let counts = format!("{{{{ messages | length }}}} messages\n{TEMPLATE}");
        for granularity in [Message, Sentence] {
            let error = chat(&counts, &[("system", "a"), ("user", "b")], granularity).unwrap_err();
            assert!(matches!(error, TextError::Spans(_)), "{error}");
            assert!(error.to_string().contains("the first 1 of 2 messages"), "{error}");
        }
    }

    #[test]
    fn tokens_that_the_tokenizer_puts_around_a_text_belong_to_none() {
        let tokenizer = bytes_tokenizer_with(&serde_json::json!({
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 0}}
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}}
        }));
        // One written in the text is part of it.
        for (text, granularity, expected) in [
            ("a", WriteGranularity::Message, vec![-1, 0, -1]),
            ("<s>a. b", WriteGranularity::Message, vec![-1, 0, 0, 0, 0, 0, -1]),
            ("<s>a. b", WriteGranularity::Sentence, vec![-1, 0, 0, 0, 1, 1, -1]),
        ] {
            let cut = cut_text(&tokenizer, text, true, granularity).unwrap();
            assert_eq!(cut.spans, expected, "{text:?}");
            assert_eq!((cut.ids[0], cut.ids.last()), (256, Some(&256)));
            let inside = cut_text(&tokenizer, text, false, granularity).unwrap();
            assert_eq!(
                inside.spans,
                expected[1..expected.len() - 1],
                "{text:?} inside a turn"
            );
        }
    }

    #[test]
    fn a_text_of_its_own_is_a_message_or_its_sentences() {
        let tokenizer = bytes_tokenizer();
        let text = "\u{e9}. \u{4f60}";
        let cut = cut_text(&tokenizer, text, true, WriteGranularity::Message).unwrap();
        assert_eq!(cut.spans, [0; 7]);
        assert_eq!(cut.ids, tokenizer.encode(text, true).unwrap());
        // Each byte of a character belongs where the character starts.
        let cut = cut_text(&tokenizer, text, true, WriteGranularity::Sentence).unwrap();
        assert_eq!(cut.spans, [0, 0, 0, 1, 1, 1, 1]);
        let cut = cut_text(&tokenizer, "", true, WriteGranularity::Sentence).unwrap();
        assert!(cut.ids.is_empty() && cut.spans.is_empty());
    }
}
