//! Text to tree: one document, no tags, no key twice, and no more of anything than a recipe has.

use std::collections::HashMap;

use saphyr_parser::{Event, Parser, ScalarStyle, Span};

use crate::error::{Fault, Place, Problem};
use crate::node::{DEEPEST, Key, MOST_NODES, Node, Value};

/// Longest text, bytes.
pub(crate) const LONGEST: usize = 1 << 20;

/// Reads one document.
///
/// # Errors
/// Text that is no YAML or breaks a limit, a second document, tags, keys that are no names or come twice, aliases
/// without an anchor before them. Aliases count as what they stand for.
pub(crate) fn parse(text: &str, source: usize) -> Result<Node, Fault> {
    let start = Place { source, line: 1, column: 1 };
    if text.len() > LONGEST {
        return Err(Fault { at: start, problem: Problem::Budget(format!("{} bytes, {LONGEST} at most", text.len())) });
    }
    let mut reader = Reader { parser: Parser::new_from_str(text), source, anchors: HashMap::new(), nodes: 0 };
    let mut root = None;
    loop {
        let (event, at) = reader.next()?;
        match event {
            Event::StreamEnd => break,
            Event::DocumentStart(_) if root.is_some() => {
                return Err(
                    reader.fault(at, "a second document; put several jobs under `jobs`, or into files of their own")
                );
            }
            Event::Nothing | Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd => {}
            event => root = Some(reader.node(event, at, 1)?),
        }
    }
    root.ok_or_else(|| Fault {
        at: start,
        problem: Problem::Syntax("an empty recipe; give at least `model`".to_owned()),
    })
}

struct Reader<'t> {
    parser: Parser<'t, saphyr_parser::StrInput<'t>>,
    source: usize,
    anchors: HashMap<usize, Node>,
    nodes: usize,
}

impl<'t> Reader<'t> {
    fn next(&mut self) -> Result<(Event<'t>, Place), Fault> {
        match self.parser.next_event() {
            Some(Ok((event, span))) => Ok((event, self.place(span))),
            Some(Err(error)) => {
                let marker = error.marker();
                let at = Place { source: self.source, line: number(marker.line()), column: number(marker.col() + 1) };
                Err(self.fault(at, &format!("not YAML: {}", error.info())))
            }
            None => Ok((Event::StreamEnd, Place { source: self.source, line: 1, column: 1 })),
        }
    }

    fn place(&self, span: Span) -> Place {
        Place { source: self.source, line: number(span.start.line()), column: number(span.start.col() + 1) }
    }

    fn fault(&self, at: Place, message: &str) -> Fault {
        Fault { at, problem: Problem::Syntax(message.to_owned()) }
    }

    fn node(&mut self, event: Event<'t>, at: Place, depth: usize) -> Result<Node, Fault> {
        self.spend(1, at)?;
        self.nested(depth, at)?;
        let (node, anchor) = match event {
            Event::Alias(anchor) => {
                let Some(node) = self.anchors.get(&anchor) else {
                    return Err(self.fault(at, "an alias within what it stands for"));
                };
                let (count, deep) = (node.count(), node.depth());
                self.spend(count, at)?;
                self.nested(depth + deep - 1, at)?;
                let value = self.anchors[&anchor].value.clone();
                return Ok(Node { at, value });
            }
            Event::Scalar(text, style, anchor, tag) => {
                self.untagged(tag.is_some(), at)?;
                let quoted = style != ScalarStyle::Plain;
                (Node { at, value: Value::Scalar { text: text.into_owned(), quoted } }, anchor)
            }
            Event::SequenceStart(anchor, tag) => {
                self.untagged(tag.is_some(), at)?;
                let mut items = Vec::new();
                loop {
                    match self.next()? {
                        (Event::SequenceEnd, _) => break,
                        (Event::StreamEnd, at) => return Err(self.fault(at, "not YAML: a list without an end")),
                        (event, at) => items.push(self.node(event, at, depth + 1)?),
                    }
                }
                (Node::list(at, items), anchor)
            }
            Event::MappingStart(anchor, tag) => {
                self.untagged(tag.is_some(), at)?;
                (Node { at, value: Value::Map(self.entries(depth)?) }, anchor)
            }
            other => return Err(self.fault(at, &format!("not YAML: {other:?} where a value belongs"))),
        };
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn entries(&mut self, depth: usize) -> Result<Vec<(Key, Node)>, Fault> {
        let mut entries: Vec<(Key, Node)> = Vec::new();
        let mut seen: HashMap<String, u32> = HashMap::new();
        loop {
            let (event, at) = self.next()?;
            let name = match event {
                Event::MappingEnd => return Ok(entries),
                Event::StreamEnd => return Err(self.fault(at, "not YAML: a map without an end")),
                Event::Scalar(text, _, _, None) => text.into_owned(),
                _ => return Err(self.fault(at, "a key that is no plain name")),
            };
            let shown = lite_model::printable(&name);
            if name == "<<" {
                return Err(self.fault(at, "merge keys (`<<`) are not read; use `defaults`, or write the keys out"));
            }
            if let Some(line) = seen.insert(name.clone(), at.line) {
                return Err(self.fault(at, &format!("`{shown}` is here twice, first in line {line}; keep one of them")));
            }
            let (event, place) = self.next()?;
            let value = self.node(event, place, depth + 1)?;
            entries.push((Key { at, name }, value));
        }
    }

    fn spend(&mut self, nodes: usize, at: Place) -> Result<(), Fault> {
        self.nodes = self.nodes.saturating_add(nodes);
        if self.nodes > MOST_NODES {
            let what = format!("more than {MOST_NODES} values, aliases expanded (line {})", at.line);
            return Err(Fault { at, problem: Problem::Budget(what) });
        }
        Ok(())
    }

    fn nested(&self, depth: usize, at: Place) -> Result<(), Fault> {
        if depth > DEEPEST {
            let what = format!("nested deeper than {DEEPEST} levels (line {})", at.line);
            return Err(Fault { at, problem: Problem::Budget(what) });
        }
        Ok(())
    }

    fn untagged(&self, tagged: bool, at: Place) -> Result<(), Fault> {
        if tagged { Err(self.fault(at, "tags (`!name`) are not read; leave the tag out")) } else { Ok(()) }
    }
}

fn number(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
