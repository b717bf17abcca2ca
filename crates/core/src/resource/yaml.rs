//! YAML text as a tree of nodes that know their places.
//!
//! A small, strict YAML: no anchors, aliases, tags or merge keys, no key twice, and bounds on size, depth and number of
//! nodes, so that no text costs more than its own length.

use crate::diagnostic::{Diagnostic, Severity};
use saphyr_parser::{Event, Marker, Parser, ScalarStyle, ScanError, Span, StrInput};
use std::collections::HashSet;

/// Largest file, in bytes.
pub const MAX_BYTES: usize = 4 << 20;
/// Deepest nesting of lists and maps.
pub const MAX_DEPTH: usize = 32;
/// Most nodes in one file.
pub const MAX_NODES: usize = 200_000;
/// Most documents in one file.
pub const MAX_DOCUMENTS: usize = 10_000;

/// One value with its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1.
    pub column: u32,
    /// The value.
    pub value: Value,
}

/// A value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A text, number, boolean or null: which of them is decided by the field that reads it.
    Scalar {
        /// Its characters.
        text: String,
        /// Not quoted and no block, so that it may be a number, a boolean or null.
        plain: bool,
    },
    /// A list.
    List(Vec<Node>),
    /// A map, in the order of the text.
    Map(Vec<(Key, Node)>),
}

/// A key of a map with its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Its characters.
    pub text: String,
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1.
    pub column: u32,
}

/// One document of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Its content.
    pub root: Node,
    /// Its lines, without the line that separates it from the one before.
    pub text: String,
}

/// Why the rest of a file could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Line, from 1; 0 for the whole file.
    pub line: u32,
    /// Column, from 1; 0 for the whole file.
    pub column: u32,
    /// What is wrong.
    pub message: String,
    /// How to mend it.
    pub help: Option<&'static str>,
}

impl Failure {
    /// The same, said of `file`.
    pub fn into_diagnostic(self, file: &str) -> Diagnostic {
        Diagnostic {
            file: file.to_owned(),
            line: self.line,
            column: self.column,
            severity: Severity::Error,
            path: String::new(),
            message: self.message,
            help: self.help.map(str::to_owned),
            awaits: None,
        }
    }

    fn at(marker: &Marker, message: impl Into<String>, help: &'static str) -> Self {
        let (line, column) = place(marker);
        Self { line, column, message: message.into(), help: Some(help) }
    }

    fn scan(error: &ScanError) -> Self {
        let (line, column) = place(error.marker());
        let message = format!("this is no YAML: {}", super::decode::clip_to(160, error.info()));
        Self { line, column, message, help: Some("check indentation, quotes and brackets from here backwards") }
    }
}

fn place(marker: &Marker) -> (u32, u32) {
    let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    (number(marker.line()), number(marker.col()).saturating_add(1))
}

/// Reads all documents of a text up to the first place at which it is no YAML, or not the YAML allowed here.
/// Empty documents are left out.
pub fn parse(text: &str) -> (Vec<Document>, Option<Failure>) {
    if text.len() > MAX_BYTES {
        let message = format!("the file has {} bytes, more than the {MAX_BYTES} allowed", text.len());
        let failure = Failure { line: 0, column: 0, message, help: Some("split it into several files") };
        return (Vec::new(), Some(failure));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut roots = Vec::new();
    let failure = Builder { parser: Parser::new_from_str(text), nodes: 0 }.documents(&mut roots).err();
    (with_texts(text, roots), failure)
}

/// A document's first line and content; `None` for an empty one, which still ends the text of the one before it.
type Root = (usize, Option<Node>);

/// Cuts the text into the documents' own lines.
fn with_texts(text: &str, roots: Vec<Root>) -> Vec<Document> {
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let starts: Vec<usize> = roots.iter().map(|(line, _)| *line).collect();
    let mut documents = Vec::with_capacity(roots.len());
    for (index, (start, root)) in roots.into_iter().enumerate() {
        let Some(root) = root else { continue };
        // Comments above the first document belong to it.
        let first = if index == 0 { 0 } else { start.saturating_sub(1) };
        let end = starts.get(index + 1).map_or(lines.len(), |next| next.saturating_sub(1));
        let own = lines.get(first..end.max(first)).unwrap_or_default();
        let marker = |line: &&&str| matches!(line.trim_end(), "---" | "...");
        let skipped = own.iter().take_while(marker).count();
        let kept: &[&str] = own.get(skipped..).unwrap_or_default();
        let trailing = kept.iter().rev().take_while(marker).count();
        documents.push(Document { root, text: kept[..kept.len() - trailing].concat() });
    }
    documents
}

struct Builder<'t> {
    parser: Parser<'t, StrInput<'t>>,
    nodes: usize,
}

/// A list or map that is not finished yet.
enum Open {
    List(Marker, Vec<Node>),
    Map(Marker, Vec<(Key, Node)>, HashSet<String>, Option<Key>),
}

impl<'t> Builder<'t> {
    fn next(&mut self) -> Result<(Event<'t>, Span), Failure> {
        match self.parser.next_event() {
            Some(Ok(event)) => Ok(event),
            Some(Err(error)) => Err(Failure::scan(&error)),
            None => Ok((Event::StreamEnd, Span::default())),
        }
    }

    fn documents(&mut self, roots: &mut Vec<Root>) -> Result<(), Failure> {
        loop {
            let (event, span) = self.next()?;
            match event {
                Event::StreamEnd => return Ok(()),
                Event::DocumentStart(_) => {
                    if roots.len() >= MAX_DOCUMENTS {
                        let message = format!("more than {MAX_DOCUMENTS} documents in one file");
                        return Err(Failure::at(&span.start, message, "split it into several files"));
                    }
                    let root = self.document()?;
                    roots.push((span.start.line(), root));
                }
                _ => {}
            }
        }
    }

    /// The content of one document. Kept on a stack of its own: nesting costs no recursion.
    fn document(&mut self) -> Result<Option<Node>, Failure> {
        let mut open: Vec<Open> = Vec::new();
        let mut root = None;
        loop {
            let (event, span) = self.next()?;
            let done = match event {
                Event::DocumentEnd | Event::StreamEnd => return Ok(root),
                Event::Nothing | Event::StreamStart | Event::DocumentStart(_) => continue,
                Event::Alias(_) => {
                    return Err(Failure::at(&span.start, "aliases (*name) are not allowed", "write the value out"));
                }
                Event::Scalar(text, style, anchor, tag) => {
                    check_plainness(&span.start, anchor, tag.is_some())?;
                    self.count(&span.start)?;
                    if let Some(Open::Map(_, _, seen, key @ None)) = open.last_mut() {
                        *key = Some(new_key(&span.start, &text, seen)?);
                        continue;
                    }
                    let plain = style == ScalarStyle::Plain;
                    // An absent value at the top is an empty document.
                    if open.is_empty() && plain && text.is_empty() {
                        continue;
                    }
                    node(&span.start, Value::Scalar { text: text.into_owned(), plain })
                }
                Event::SequenceStart(anchor, tag) => {
                    self.open(&span.start, anchor, tag.is_some(), &open)?;
                    open.push(Open::List(span.start, Vec::new()));
                    continue;
                }
                Event::MappingStart(anchor, tag) => {
                    self.open(&span.start, anchor, tag.is_some(), &open)?;
                    open.push(Open::Map(span.start, Vec::new(), HashSet::new(), None));
                    continue;
                }
                Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                    Some(Open::List(marker, items)) => node(&marker, Value::List(items)),
                    Some(Open::Map(marker, fields, _, _)) => node(&marker, Value::Map(fields)),
                    None => continue,
                },
            };
            match open.last_mut() {
                None => root = Some(done),
                Some(Open::List(_, items)) => items.push(done),
                Some(Open::Map(_, fields, _, key)) => {
                    if let Some(key) = key.take() {
                        fields.push((key, done));
                    }
                }
            }
        }
    }

    /// Checks that a list or map may begin here.
    fn open(&mut self, marker: &Marker, anchor: usize, tagged: bool, open: &[Open]) -> Result<(), Failure> {
        check_plainness(marker, anchor, tagged)?;
        self.count(marker)?;
        if open.len() >= MAX_DEPTH {
            let message = format!("nested more than {MAX_DEPTH} levels deep");
            return Err(Failure::at(marker, message, "no resource needs that; check the brackets"));
        }
        if let Some(Open::Map(_, _, _, None)) = open.last() {
            return Err(Failure::at(marker, "a key must be a text", "write 'name: value'"));
        }
        Ok(())
    }

    fn count(&mut self, marker: &Marker) -> Result<(), Failure> {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            let message = format!("more than {MAX_NODES} values in one file");
            return Err(Failure::at(marker, message, "split it into several files"));
        }
        Ok(())
    }
}

fn check_plainness(marker: &Marker, anchor: usize, tagged: bool) -> Result<(), Failure> {
    if anchor != 0 {
        return Err(Failure::at(marker, "anchors (&name) are not allowed", "write the value out where it is used"));
    }
    if tagged {
        return Err(Failure::at(marker, "tags (!name) are not allowed", "remove the tag"));
    }
    Ok(())
}

fn new_key(marker: &Marker, text: &str, seen: &mut HashSet<String>) -> Result<Key, Failure> {
    if text == "<<" {
        return Err(Failure::at(marker, "merge keys (<<) are not allowed", "write the fields out"));
    }
    if !seen.insert(text.to_owned()) {
        let message = format!("the key '{}' stands twice in this map", super::decode::clip(text));
        return Err(Failure::at(marker, message, "remove one of the two"));
    }
    let (line, column) = place(marker);
    Ok(Key { text: text.to_owned(), line, column })
}

fn node(marker: &Marker, value: Value) -> Node {
    let (line, column) = place(marker);
    Node { line, column, value }
}
