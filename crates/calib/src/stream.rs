//! Documents to one stream of token ids: texts joined, conversations rendered.

use crate::document::{Document, Message};
use crate::error::CalibError;
use crate::tokenizer::ModelTokenizer;

/// What stands between two texts.
pub(crate) const JOIN: &str = "\n\n";
/// Of a text, at first this many bytes per token that is needed are tokenised, and twice as much as long as that is
/// too little: tokenising takes some two hundred bytes of memory per byte of text.
const BYTES_PER_TOKEN: usize = 5;
/// Texts up to this size are tokenised whole.
const WHOLE: usize = 64 << 10;
/// Tokens dropped where a long text was cut, since they depend on what follows.
const CUT_MARGIN: usize = 512;

/// What to do with a conversation the chat template refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Fail.
    Error,
    /// Leave it out and say so.
    Skip,
}

/// Token ids of a dataset, and what there is to say about them.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    pub(crate) ids: Vec<u32>,
    pub(crate) notes: Vec<String>,
}

/// Tokenises documents in order, until there are `needed` ids or no more text.
///
/// Neighbouring texts are joined and tokenised as one; the first run of texts gets the tokenizer's special tokens, as
/// `tokenizer(text)` would give them. Conversations go through the chat template, which brings its own special tokens.
pub(crate) fn tokenise(
    documents: &[Document],
    tokenizer: &ModelTokenizer,
    name: &str,
    refused: Refused,
    needed: usize,
) -> Result<Stream, CalibError> {
    let mut stream = Stream::default();
    let mut skipped: Option<(usize, String)> = None;
    let (mut plain, mut control) = (false, 0u64);
    let mut rest = documents;
    while let Some(first) = rest.first() {
        if stream.ids.len() >= needed {
            break;
        }
        let run = if is_text(first, tokenizer) {
            let run = rest.iter().take_while(|d| is_text(d, tokenizer)).count();
            plain |= rest[..run].iter().any(|d| matches!(d, Document::Exchange(_)));
            let text = rest[..run].iter().map(text_of).collect::<Vec<_>>().join(JOIN);
            let special = stream.ids.is_empty();
            let ids = encode_start(&text, special, tokenizer, needed - stream.ids.len())?;
            let own = if special { tokenizer.encode("", true)?.len() } else { 0 };
            let specials = tokenizer.special_ids();
            let seen = ids.iter().filter(|id| specials.binary_search(id).is_ok()).count();
            control += seen.saturating_sub(own) as u64;
            stream.ids.extend(ids);
            run
        } else {
            let messages = messages_of(first);
            match tokenizer.render_row(messages, name) {
                Ok(text) => stream.ids.extend(tokenizer.encode(&text, false)?),
                Err(CalibError::ChatTemplate { detail }) if refused == Refused::Skip => {
                    skipped.get_or_insert((0, detail)).0 += 1;
                }
                Err(e) => return Err(e),
            }
            1
        };
        rest = &rest[run..];
    }
    if let Some((count, reason)) = skipped {
        stream.notes.push(format!("conversations of `{name}` left out: {count} (chat template: {reason})"));
    }
    if plain {
        stream.notes.push("the tokenizer has no chat template: conversations were read as plain text".to_owned());
    }
    if control > 0 {
        stream.notes.push(format!("the text spells out special tokens {control} times; they were encoded as such"));
    }
    Ok(stream)
}

fn is_text(document: &Document, tokenizer: &ModelTokenizer) -> bool {
    match document {
        Document::Text(_) => true,
        Document::Chat(_) => false,
        Document::Exchange(_) => !tokenizer.has_chat_template(),
    }
}

fn messages_of(document: &Document) -> &[Message] {
    match document {
        Document::Text(_) => &[],
        Document::Chat(messages) | Document::Exchange(messages) => messages,
    }
}

/// The text of a document, conversations as their turns joined by newlines.
pub(crate) fn text_of(document: &Document) -> std::borrow::Cow<'_, str> {
    match document {
        Document::Text(text) => text.into(),
        Document::Chat(messages) | Document::Exchange(messages) => {
            messages.iter().map(|m| m.content.as_str()).collect::<Vec<_>>().join("\n").into()
        }
    }
}

/// The text one document gives the tokenizer when documents are tokenised one by one.
pub(crate) fn rendered(document: &Document, tokenizer: &ModelTokenizer, name: &str) -> Result<String, CalibError> {
    match document {
        Document::Text(text) => Ok(text.clone()),
        Document::Chat(messages) | Document::Exchange(messages) => tokenizer.render_row(messages, name),
    }
}

/// Encodes a text from its start: all of it if it is short, else enough for `needed` ids.
fn encode_start(text: &str, special: bool, tokenizer: &ModelTokenizer, needed: usize) -> Result<Vec<u32>, CalibError> {
    encode_within(text, special, tokenizer, needed, needed.saturating_mul(BYTES_PER_TOKEN).max(WHOLE))
}

fn encode_within(
    text: &str,
    special: bool,
    tokenizer: &ModelTokenizer,
    needed: usize,
    whole: usize,
) -> Result<Vec<u32>, CalibError> {
    let mut size = whole;
    loop {
        if text.len() <= size {
            return tokenizer.encode(text, special);
        }
        let cut = text.floor_char_boundary(size);
        let mut ids = tokenizer.encode(&text[..cut], special)?;
        ids.truncate(ids.len().saturating_sub(CUT_MARGIN));
        if ids.len() >= needed {
            return Ok(ids);
        }
        size = size.saturating_mul(2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{bare_tokenizer, tokenizer};

    #[test]
    fn neighbouring_texts_are_one_text() {
        let tokenizer = tokenizer();
        let documents = [Document::Text("one two".into()), Document::Text(" three\n".into())];
        let stream = tokenise(&documents, &tokenizer, "x", Refused::Error, usize::MAX).expect("encodes");
        assert_eq!(stream.ids, tokenizer.encode("one two\n\n three\n", true).expect("encodes"));
        assert!(stream.notes.is_empty(), "{:?}", stream.notes);
    }

    #[test]
    fn conversations_stand_for_themselves() {
        let tokenizer = tokenizer();
        let chat = || Document::Chat(vec![Message::new("user", "hi"), Message::new("assistant", "yes")]);
        let documents = [Document::Text("one".into()), chat(), Document::Text("two".into())];
        let stream = tokenise(&documents, &tokenizer, "x", Refused::Error, usize::MAX).expect("encodes");
        let turns = tokenizer.render_row(messages_of(&documents[1]), "x").expect("renders");
        let wanted = [
            tokenizer.encode("one", true).expect("encodes"),
            tokenizer.encode(&turns, false).expect("encodes"),
            tokenizer.encode("two", false).expect("encodes"),
        ]
        .concat();
        assert_eq!(stream.ids, wanted);
        let error = tokenise(&[chat()], &bare_tokenizer(), "x", Refused::Error, 9).expect_err("no template");
        assert_eq!(error.kind(), crate::ErrorKind::Unsupported);
        assert!(error.to_string().contains("wikitext2, c4 or builtin"), "{error}");
    }

    #[test]
    fn refused_conversations_are_reported() {
        let tokenizer = tokenizer();
        let documents = [Document::Exchange(vec![Message::new("robot", "hi")]), Document::Text("two".into())];
        let error = tokenise(&documents, &tokenizer, "x", Refused::Error, 9).expect_err("refused").to_string();
        assert!(error.contains("the template says: unknown role robot"), "{error}");
        let stream = tokenise(&documents, &tokenizer, "x", Refused::Skip, 9).expect("skips");
        assert!(stream.notes[0].starts_with("conversations of `x` left out: 1 (chat template: "), "{:?}", stream.notes);
        assert_eq!(stream.ids, tokenizer.encode("two", true).expect("encodes"));
    }

    #[test]
    fn exchanges_become_text_without_a_template() {
        let tokenizer = bare_tokenizer();
        let exchange = Document::Exchange(vec![Message::new("user", "hi"), Message::new("assistant", "yes")]);
        let stream =
            tokenise(&[exchange, Document::Text("two".into())], &tokenizer, "x", Refused::Error, 9).expect("encodes");
        assert_eq!(stream.ids, tokenizer.encode("hi\nyes\n\ntwo", true).expect("encodes"));
        assert!(stream.notes[0].contains("plain text"));
    }

    #[test]
    fn control_tokens_in_text_are_counted() {
        let tokenizer = tokenizer();
        let documents = [Document::Text("a <s> b </s>".into())];
        let stream = tokenise(&documents, &tokenizer, "x", Refused::Error, 9).expect("encodes");
        assert!(stream.notes[0].contains("special tokens 2 times"), "{:?}", stream.notes);
    }

    #[test]
    fn a_cut_text_gives_the_same_first_tokens() {
        let tokenizer = tokenizer();
        let text = "The quick brown fox é jumps over the lazy dog, 123 times.\n".repeat(400);
        let all = tokenizer.encode(&text, true).expect("encodes");
        let some = encode_within(&text, true, &tokenizer, 1000, 4001).expect("encodes");
        assert!(some.len() >= 1000 && some.len() < all.len());
        assert_eq!(some[..], all[..some.len()]);
        let every = encode_within(&text, true, &tokenizer, usize::MAX, 4001).expect("encodes");
        assert_eq!(every, all);
    }
}
