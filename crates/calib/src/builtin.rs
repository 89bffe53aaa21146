//! The corpora inside the program.

use sha2::{Digest, Sha256};

use crate::document::{Document, Fields};
use crate::error::CalibError;
use crate::source::{Collector, Limits, ParquetInput, SourceFile, hex, read_parquet};

macro_rules! corpus {
    ($name:literal) => {
        (
            concat!("builtin/", $name, ".parquet"),
            include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../calib_data/builtin/", $name, ".parquet")),
        )
    };
}

type Corpus = (&'static str, &'static [u8]);

const WIKITEXT: Corpus = corpus!("wikitext");
const PTB: Corpus = corpus!("ptb");
const C4: Corpus = corpus!("c4");
const CHAT: Corpus = corpus!("chat");
const HELDOUT: Corpus = corpus!("heldout");

/// Newswire sentences that make one document.
const SENTENCES: usize = 12;

/// The calibration documents, interleaved so that every stretch of them holds all kinds of text.
pub(crate) fn documents() -> Result<(Vec<Document>, Vec<SourceFile>), CalibError> {
    let wikitext = articles(texts(WIKITEXT, "text")?);
    let ptb = texts(PTB, "sentence")?.chunks(SENTENCES).map(|s| Document::Text(s.join("\n"))).collect();
    let c4 = texts(C4, "text")?.into_iter().map(Document::Text).collect();
    let chat = rows(CHAT, &Fields::Messages("messages".into(), Vec::new()))?
        .into_iter()
        .map(|document| match document {
            // Without a chat template these may be read as plain text.
            Document::Chat(messages) => Document::Exchange(messages),
            other => other,
        })
        .collect();
    let files = [WIKITEXT, PTB, C4, CHAT].map(file).to_vec();
    Ok((interleave(vec![wikitext, ptb, c4, chat]), files))
}

/// The held-out text, for evaluation: nothing of it is in [`documents`].
pub(crate) fn held_out() -> Result<(Vec<Document>, Vec<SourceFile>), CalibError> {
    let documents = texts(HELDOUT, "text")?.into_iter().map(Document::Text).collect();
    Ok((documents, vec![file(HELDOUT)]))
}

fn rows((name, bytes): Corpus, fields: &Fields) -> Result<Vec<Document>, CalibError> {
    let mut into = Collector::new(Limits::default(), None);
    read_parquet(ParquetInput::Embedded(bytes), name, fields, &mut into)?;
    Ok(into.documents)
}

fn texts(corpus: Corpus, column: &str) -> Result<Vec<String>, CalibError> {
    let documents = rows(corpus, &Fields::Text(column.to_owned()))?;
    Ok(documents.into_iter().filter_map(|d| if let Document::Text(t) = d { Some(t) } else { None }).collect())
}

fn file((name, bytes): Corpus) -> SourceFile {
    SourceFile { name: name.to_owned(), sha256: hex(&Sha256::digest(bytes)), bytes: bytes.len() as u64 }
}

/// Bytes after which an article is divided at the next empty line.
const LONG_ARTICLE: usize = 3000;

/// Lines to articles: a heading of the first level (` = Title = `) begins one, and long ones are divided between
/// paragraphs. Lines keep their newlines; an empty row is an empty line.
fn articles(lines: Vec<String>) -> Vec<Document> {
    let mut articles: Vec<String> = Vec::new();
    for line in lines {
        let heading = line.trim().strip_prefix("= ").is_some_and(|rest| !rest.starts_with('='));
        let long = articles.last().is_some_and(|article| article.len() > LONG_ARTICLE);
        let divide = heading || (long && line.trim().is_empty());
        match articles.last_mut() {
            Some(article) if !divide => article.push_str(if line.is_empty() { "\n" } else { &line }),
            _ => articles.push(line),
        }
    }
    let articles = articles.into_iter().map(|a| a.trim().to_owned()).filter(|a| !a.is_empty());
    articles.map(Document::Text).collect()
}

/// Merges lists of documents so that, at every point, each has given about the same share of its bytes.
fn interleave(lists: Vec<Vec<Document>>) -> Vec<Document> {
    let totals: Vec<u128> =
        lists.iter().map(|l| l.iter().map(|d| u128::from(d.bytes())).sum::<u128>().max(1)).collect();
    let mut given = vec![0u128; lists.len()];
    let mut sources: Vec<_> = lists.into_iter().map(|l| l.into_iter().peekable()).collect();
    let mut merged = Vec::new();
    loop {
        // The list that lags behind most: the smallest given/total, the first of equals.
        let next = (0..sources.len()).filter(|i| sources[*i].peek().is_some()).fold(None, |best: Option<usize>, i| {
            Some(match best {
                Some(b) if given[b] * totals[i] <= given[i] * totals[b] => b,
                _ => i,
            })
        });
        let Some(i) = next else { break };
        if let Some(document) = sources[i].next() {
            given[i] += u128::from(document.bytes()).max(1);
            merged.push(document);
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::text_of;

    #[test]
    fn the_corpora_are_there() {
        let (documents, files) = documents().expect("readable");
        assert_eq!(files.len(), 4);
        let chats = documents.iter().filter(|d| matches!(d, Document::Exchange(_))).count();
        assert!(chats > 5 && documents.len() > 4 * chats / 2, "{chats} of {}", documents.len());
        let bytes: u64 = documents.iter().map(Document::bytes).sum();
        assert!(bytes > 50_000, "{bytes}");
        // Every quarter of the text has conversations.
        for quarter in documents.chunks(documents.len().div_ceil(4)) {
            assert!(quarter.iter().any(|d| matches!(d, Document::Exchange(_))));
        }
    }

    #[test]
    fn held_out_text_is_not_calibration_text() {
        let calibration: Vec<_> = documents().expect("readable").0.iter().map(|d| text_of(d).into_owned()).collect();
        let (held, _) = held_out().expect("readable");
        assert!(!held.is_empty());
        for document in &held {
            let text = text_of(document);
            assert!(text.len() < 80 || calibration.iter().all(|c| !c.contains(text.as_ref())), "{text}");
        }
    }

    #[test]
    fn headings_begin_articles() {
        let lines = [" = A = \n", "", " one \n", " = = B = = \n", " two \n", " = C = \n", " three \n"];
        let got = articles(lines.map(str::to_owned).to_vec());
        let wanted = ["= A = \n\n one \n = = B = = \n two", "= C = \n three"];
        assert_eq!(got, wanted.map(|t| Document::Text(t.to_owned())));
    }

    #[test]
    fn long_articles_are_divided_between_paragraphs() {
        let paragraph = format!("{}\n", "x".repeat(LONG_ARTICLE / 2));
        let rows = [&paragraph, "", &paragraph, &paragraph, "", "end\n"].map(str::to_owned).to_vec();
        let got = articles(rows);
        assert_eq!(got.len(), 2);
        assert_eq!(got[1], Document::Text("end".to_owned()));
    }

    #[test]
    fn lists_are_spent_evenly() {
        let text = |t: &str| Document::Text(t.to_owned());
        let merged = interleave(vec![
            vec![text("aa"), text("ab"), text("ac"), text("ad")],
            vec![text("ba"), text("bb")],
            vec![],
        ]);
        let order: Vec<_> = merged.iter().map(|d| text_of(d).into_owned()).collect();
        assert_eq!(order, ["aa", "ba", "ab", "ac", "bb", "ad"]);
    }
}
