//! Chat templates: from messages to the text that a model was trained on. It renders Jinja as Hugging Face's `apply_chat_template`
//! does, with a limit on work and on output, since a template comes with a bundle from anywhere. It knows messages and strings; it
//! knows nothing of tokens.

use std::io::{self, Write};
use std::path::Path;

use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::Serialize;

use super::{TextError, date};
use crate::bundle::Manifest;

const NAME: &str = "chat_template";
/// Instructions that one rendering may take: about a second, and some hundred times what a long conversation needs.
const FUEL: u64 = 10_000_000;
/// A template's source may not be longer.
const MAX_SOURCE: usize = 1 << 20;
/// Bytes that a rendering may add to each byte of the messages, and at all.
const MAX_GROWTH: usize = 8;
const MAX_EXTRA: usize = 1 << 20;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// The chat template of the bundle in `dir`; `None` when the manifest has none.
    ///
    /// # Errors
    /// [`TextError::File`] when the file cannot be read, [`TextError::Template`] when it is no template.
    pub fn load(dir: &Path, manifest: &Manifest) -> Result<Option<Self>, TextError> {
        let Some((text, file)) = manifest
            .text
            .as_ref()
            .and_then(|text| Some((text, text.chat_template.as_ref()?)))
        else {
            return Ok(None);
        };
        let source = std::fs::read_to_string(dir.join(file)).map_err(|error| TextError::File {
            file: file.clone(),
            message: error.to_string(),
        })?;
        let token = |token: &Option<String>| token.clone().unwrap_or_default();
        Self::new(&source, &token(&text.bos_token), &token(&text.eos_token)).map(Some)
    }

    /// Compiles a template; `bos_token` and `eos_token` are what it sees under these names.
    ///
    /// # Errors
    /// [`TextError::Template`] names the line that is wrong.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, TextError> {
        if source.len() > MAX_SOURCE {
            return Err(TextError::Template {
                line: None,
                message: format!(
                    "it takes {} bytes, at most {MAX_SOURCE} are allowed",
                    source.len()
                ),
            });
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: &str| date::strftime_now(format));
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| template_error(&error))?;
        Ok(Self {
            environment,
            bos_token: bos_token.into(),
            eos_token: eos_token.into(),
        })
    }

    /// The text of a conversation; `add_generation_prompt` adds what comes before the model's next reply.
    ///
    /// # Errors
    /// [`TextError::Template`] when the template refuses the messages, fails, or takes more work or room than any real one.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TextError> {
        let input: usize = messages
            .iter()
            .map(|message| message.role.len() + message.content.len())
            .sum();
        let mut output = Bounded {
            bytes: Vec::new(),
            room: input.saturating_mul(MAX_GROWTH).saturating_add(MAX_EXTRA),
        };
        let context = minijinja::context! {
            messages,
            add_generation_prompt,
            bos_token => self.bos_token,
            eos_token => self.eos_token,
            tools => (),
            documents => (),
        };
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| template_error(&error))?;
        template
            .render_captured_to(context, &mut output)
            .map_err(|error| template_error(&error))?;
        String::from_utf8(output.bytes).map_err(|error| TextError::Template {
            line: None,
            message: format!("its output is no UTF-8: {error}"),
        })
    }
}

/// Output up to a limit.
struct Bounded {
    bytes: Vec<u8>,
    room: usize,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.room - self.bytes.len() {
            return Err(io::Error::other(format!(
                "its output is longer than {} bytes",
                self.room
            )));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn template_error(error: &Error) -> TextError {
    let message = match error.kind() {
        ErrorKind::OutOfFuel => {
            "it takes more work than any conversation needs; is there a loop that does not end?".into()
        }
        _ => match std::error::Error::source(error) {
            Some(source) => format!(
                "{}: {source}",
                error
                    .detail()
                    .map_or_else(|| error.kind().to_string(), str::to_owned)
            ),
            None => error
                .detail()
                .map_or_else(|| error.kind().to_string(), str::to_owned),
        },
    };
    TextError::Template {
        line: error.line(),
        message,
    }
}

/// What templates call to refuse a conversation.
#[allow(clippy::needless_pass_by_value)] // the engine's calling convention
fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// `tojson` as Hugging Face defines it: Python's `json.dumps(value, ensure_ascii=False, indent=indent)`, nothing escaped for HTML.
#[allow(clippy::needless_pass_by_value)] // the engine's calling convention
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Named by some templates at the value that holds here anyway.
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut bytes = Vec::new();
    let written = if let Some(indent) = indent {
        let indent = " ".repeat(indent.min(16));
        let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))
    } else {
        value.serialize(&mut serde_json::Serializer::with_formatter(
            &mut bytes,
            PythonSpacing,
        ))
    };
    let text = written
        .map_err(io::Error::from)
        .and_then(|()| String::from_utf8(bytes).map_err(io::Error::other));
    text.map(Value::from_safe_string).map_err(|error| {
        Error::new(ErrorKind::InvalidOperation, "a value cannot be written as JSON").with_source(error)
    })
}

/// JSON with a space after each comma and colon.
struct PythonSpacing;

impl serde_json::ser::Formatter for PythonSpacing {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Replaces `{% generation %}` and `{% endgeneration %}`, by which templates mark the assistant's text for training, by a condition that
/// always holds. Whitespace control stays as it is.
fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        result.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end + 2);
        let inner = tag[2..end]
            .trim_start_matches(['-', '+'])
            .trim_end_matches(['-', '+']);
        match inner.trim() {
            "generation" => result.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => result.push_str(&tag.replace("endgeneration", "endif")),
            _ => result.push_str(tag),
        }
        rest = after;
    }
    result.push_str(rest);
    result
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn messages(all: &[(&str, &str)]) -> Vec<Message> {
        all.iter()
            .map(|&(role, content)| Message {
                role: role.into(),
                content: content.into(),
            })
            .collect()
    }

    fn render(source: &str, all: &[(&str, &str)]) -> Result<String, TextError> {
        ChatTemplate::new(source, "<s>", "</s>")?.render(&messages(all), true)
    }

    fn failure(source: &str) -> (Option<usize>, String) {
        match render(source, &[("user", "hi")]) {
            Err(TextError::Template { line, message }) => (line, message),
            other => (None, format!("no template error but {other:?}")),
        }
    }

    #[test]
    fn a_template_renders_as_hugging_face_renders_it() {
        // Blocks on lines of their own leave neither their indentation nor their line break.
        let source = "\
{%- if messages[0].role == 'system' %}
    {{- bos_token + messages[0]['content'] + '\\n' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{% for message in messages %}
    {% if loop.first %}
[
    {% endif %}
<|{{ message.role }}|>{{ message['content'] | trim }}{{ eos_token if message.role == 'assistant' }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
";
        let out = render(
            source,
            &[("system", "Be brief."), ("user", " hello "), ("assistant", "hi")],
        )
        .unwrap();
        assert_eq!(
            out,
            "<s>Be brief.\n[\n<|user|>hello\n<|assistant|>hi</s>\n<|assistant|>\n"
        );
    }

    #[test]
    fn python_s_methods_and_jinja_s_extensions_are_there() {
        for (source, expected) in [
            (
                "{{ messages[0].content.split('</think>')[-1].lstrip('\\n') }}",
                "answer",
            ),
            ("{{ messages[0].content.startswith('<think>') }}", "True"),
            (
                "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
                "user",
            ),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "2",
            ),
            (
                "{% for m in messages[::-1] %}{{ m.role }} {% endfor %}",
                "assistant user ",
            ),
            (
                "{{ 'none' if tools is none else 'some' }}{{ 'undefined' if enable_thinking is not defined }}",
                "noneundefined",
            ),
            ("{{ messages[0].get('name', 'nobody') }}", "nobody"),
            ("{{ strftime_now('%Y') | int > 2000 }}", "True"),
            ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') }}", "<a>"),
        ] {
            let out = render(
                source,
                &[("user", "<think>hm</think>\nanswer"), ("assistant", "b")],
            )
            .unwrap();
            assert_eq!(out, expected, "{source}");
        }
    }

    #[test]
    fn json_is_python_s_and_nothing_is_escaped_for_html() {
        let source = "{{ {'a': [1, 'x'], 'b': {}, 'c': messages[0].content} | tojson }}";
        assert_eq!(
            render(source, &[("user", "<é & 'q'>\n")]).unwrap(),
            r#"{"a": [1, "x"], "b": {}, "c": "<é & 'q'>\n"}"#
        );
        let source = "{{ {'a': [1, 2], 'b': []} | tojson(indent=2) }}";
        assert_eq!(
            render(source, &[]).unwrap(),
            "{\n  \"a\": [\n    1,\n    2\n  ],\n  \"b\": []\n}"
        );
        assert_eq!(
            render("{{ messages[0].content }}", &[("user", "<b>&\"")]).unwrap(),
            "<b>&\""
        );
    }

    #[test]
    fn generation_marks_are_passed_over() {
        let source = "a{% generation %}b{%- endgeneration %} c {%- generation -%} d {%- endgeneration -%} e";
        assert_eq!(render(source, &[]).unwrap(), "ab cde");
        assert_eq!(
            without_generation_tags("{% if generation %}{% x"),
            "{% if generation %}{% x"
        );
    }

    #[test]
    fn errors_name_the_line_and_the_template_s_own_words() {
        assert_eq!(
            failure("a\nb\n{{ raise_exception('Roles must alternate') }}"),
            (Some(3), "Roles must alternate".into())
        );
        assert_eq!(failure("a\n{% if %}").0, Some(2));
        assert_eq!(failure("a\n\n{{ messages.nothing.at_all }}").0, Some(3));
        assert_eq!(failure("{{ nothing_of_the_kind() }}").0, Some(1));
        assert_eq!(failure("{% include 'other' %}").0, Some(1));
        let error = render("{{ raise_exception('No.') }}", &[]).unwrap_err();
        assert_eq!(error.to_string(), "the chat template, line 1: No.");
    }

    #[test]
    fn a_template_that_would_never_end_is_stopped() {
        let loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        assert!(failure(loops).1.contains("more work"), "{:?}", failure(loops));
        let recursion = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
        assert!(failure(recursion).0.is_some(), "{:?}", failure(recursion));
        let flood = "{% set x = 'xxxxxxxxxx' * 10000 %}{% for a in range(99999) %}{{ x }}{% endfor %}";
        assert!(failure(flood).1.contains("longer than"), "{:?}", failure(flood));
        assert!(failure(&"x".repeat(MAX_SOURCE + 1)).1.contains("are allowed"));
        let nested = format!(
            "{}{}",
            "{% if true %}".repeat(10_000),
            "{% endif %}".repeat(10_000)
        );
        assert!(failure(&nested).1.contains("recursion"), "{:?}", failure(&nested));
    }
}
