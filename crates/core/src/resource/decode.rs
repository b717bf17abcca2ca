//! Reading fields out of a node tree, collecting everything that is wrong.
//!
//! A [`Cursor`] stands at one node and knows its field path. Its readers return `None` after having reported why, so
//! that a decoder goes on with the next field and a document's errors come all at once.

use super::meta::Located;
use super::yaml::{Key, Node, Value};
use crate::diagnostic::{Diagnostic, Severity};
use std::cell::{Cell, RefCell};
use std::sync::Arc;

/// Most findings reported for one document; a text that is no configuration at all should not bury its first error.
const MAX_FINDINGS: usize = 50;

/// The findings about one document.
pub(super) struct Report {
    file: Arc<str>,
    found: RefCell<Vec<Diagnostic>>,
    left_out: Cell<usize>,
    errors: Cell<bool>,
}

impl Report {
    pub(super) fn new(file: Arc<str>) -> Self {
        Self { file, found: RefCell::default(), left_out: Cell::new(0), errors: Cell::new(false) }
    }

    pub(super) fn file(&self) -> &Arc<str> {
        &self.file
    }

    pub(super) fn has_errors(&self) -> bool {
        self.errors.get()
    }

    /// Hands the findings over in the order of their places.
    pub(super) fn finish(self, diagnostics: &mut Vec<Diagnostic>) {
        let mut found = self.found.into_inner();
        found.sort();
        if let (1.., Some(last)) = (self.left_out.get(), found.last().cloned()) {
            let message = format!("{} more findings in this document", self.left_out.get());
            found.push(Diagnostic { path: String::new(), message, help: None, ..last });
        }
        diagnostics.append(&mut found);
    }

    fn push(&self, (line, column): (u32, u32), severity: Severity, path: &str, message: String, help: Option<String>) {
        if severity == Severity::Error {
            self.errors.set(true);
        }
        let mut found = self.found.borrow_mut();
        if found.len() >= MAX_FINDINGS {
            self.left_out.set(self.left_out.get() + 1);
            return;
        }
        let (file, path) = (self.file.to_string(), path.to_owned());
        found.push(Diagnostic { file, line, column, severity, path, message, help, awaits: None });
    }
}

/// A place in a document: one node, and the path of fields that leads to it.
#[derive(Clone)]
pub(super) struct Cursor<'a> {
    report: &'a Report,
    pub(super) node: &'a Node,
    path: String,
    place: (u32, u32),
}

impl<'a> Cursor<'a> {
    pub(super) fn root(report: &'a Report, node: &'a Node) -> Self {
        Self::new(report, node, String::new())
    }

    fn new(report: &'a Report, node: &'a Node, path: String) -> Self {
        Self { report, node, path, place: (node.line, node.column) }
    }

    /// Speaks of a field that was read before.
    pub(super) fn elsewhere<T>(&self, field: &Located<T>) -> Self {
        Self { path: field.path.clone(), place: (field.line, field.column), ..self.clone() }
    }

    pub(super) fn report(&self) -> &'a Report {
        self.report
    }

    pub(super) fn error(&self, message: impl Into<String>) {
        self.say(Severity::Error, message.into(), None);
    }

    pub(super) fn error_help(&self, message: impl Into<String>, help: impl Into<String>) {
        self.say(Severity::Error, message.into(), Some(help.into()));
    }

    pub(super) fn warn(&self, message: impl Into<String>, help: impl Into<String>) {
        self.say(Severity::Warning, message.into(), Some(help.into()));
    }

    fn say(&self, severity: Severity, message: String, help: Option<String>) {
        self.report.push(self.place, severity, &self.path, message, help);
    }

    /// `value` with this place.
    pub(super) fn located<T>(&self, value: T) -> Located<T> {
        Located { value, line: self.place.0, column: self.place.1, path: self.path.clone() }
    }

    /// Whether the field is written and empty (`field:`, `field: null`), which means the same as leaving it out.
    fn is_null(&self) -> bool {
        matches!(&self.node.value, Value::Scalar { text, plain: true } if matches!(text.as_str(), "" | "~" | "null"))
    }

    fn wrong_type(&self, expected: &str) {
        let found = match &self.node.value {
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a map".to_owned(),
            Value::Scalar { text, plain } => format!("{} '{}'", scalar_type(text, *plain), clip(text)),
        };
        self.error_help(format!("expected {expected}, found {found}"), self.right_type(expected));
    }

    /// How to write what was expected, from what is there.
    fn right_type(&self, expected: &str) -> String {
        match (expected, &self.node.value) {
            ("a list", Value::Scalar { text, plain: true }) => format!("write [{}]", clip(text)),
            ("a list", Value::Scalar { text, plain: false }) => format!("write [\"{}\"]", clip(text)),
            ("a list", _) => "begin each item with '- '".to_owned(),
            ("a map", _) => "write its fields below it, each as 'name: value'".to_owned(),
            ("a number", Value::Scalar { text, plain: false }) if text.parse::<i64>().is_ok() => {
                format!("write {} without quotes", clip(text))
            }
            ("a number", _) => "write a whole number in digits".to_owned(),
            ("a text", _) => "write one text".to_owned(),
            _ => format!("write {expected}"),
        }
    }

    /// A text. Numbers and booleans must be quoted, as in a cluster.
    pub(super) fn text(&self) -> Option<&'a str> {
        match &self.node.value {
            Value::Scalar { text, plain } => {
                let scalar = scalar_type(text, *plain);
                if scalar == "the text" {
                    return Some(text);
                }
                let help = format!("write \"{}\"", clip(text));
                self.error_help(format!("expected a text, found {scalar} '{}'", clip(text)), help);
                None
            }
            _ => {
                self.wrong_type("a text");
                None
            }
        }
    }

    /// A whole number from `low` to `high`.
    pub(super) fn integer(&self, low: u64, high: u64) -> Option<u64> {
        let Value::Scalar { text, plain: true } = &self.node.value else {
            self.wrong_type("a number");
            return None;
        };
        let digits = text.strip_prefix('-').unwrap_or(text);
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            self.wrong_type("a number");
            return None;
        }
        match text.parse::<u64>() {
            Ok(number) if (low..=high).contains(&number) => Some(number),
            _ => {
                self.error(format!("{} is not between {low} and {high}", clip(text)));
                None
            }
        }
    }

    /// `true` or `false`; no other word is a boolean.
    pub(super) fn boolean(&self) -> Option<bool> {
        match &self.node.value {
            Value::Scalar { text, plain: true } if text == "true" => Some(true),
            Value::Scalar { text, plain: true } if text == "false" => Some(false),
            Value::Scalar { text, .. } if matches!(text.to_ascii_lowercase().as_str(), "yes" | "on" | "true") => {
                self.error_help(format!("'{text}' is no boolean"), "write true");
                None
            }
            Value::Scalar { text, .. } if matches!(text.to_ascii_lowercase().as_str(), "no" | "off" | "false") => {
                self.error_help(format!("'{text}' is no boolean"), "write false");
                None
            }
            _ => {
                self.wrong_type("true or false");
                None
            }
        }
    }

    /// One of a closed set of words.
    pub(super) fn choice<T: Copy>(&self, choices: &[(&str, T)]) -> Option<T> {
        let text = self.text()?;
        if let Some((_, value)) = choices.iter().find(|(name, _)| *name == text) {
            return Some(*value);
        }
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        let help = match nearest(text, names.iter().copied()) {
            Some(name) => format!("did you mean '{name}'?"),
            None => format!("write {}", one_of(&names)),
        };
        self.error_help(format!("unknown value '{}'", clip(text)), help);
        None
    }

    /// Whether this is a list without items.
    pub(super) fn is_empty_list(&self) -> bool {
        matches!(&self.node.value, Value::List(items) if items.is_empty())
    }

    /// The items of a list of at most `limit`.
    pub(super) fn items(&self, limit: usize) -> Vec<Cursor<'a>> {
        let Value::List(items) = &self.node.value else {
            self.wrong_type("a list");
            return Vec::new();
        };
        if items.len() > limit {
            self.error(format!("{} items, more than the {limit} allowed", items.len()));
        }
        let item = |(index, node)| Cursor::new(self.report, node, format!("{}[{index}]", self.path));
        items.iter().take(limit).enumerate().map(item).collect()
    }

    /// The entries of a map with free keys, of at most `limit`.
    pub(super) fn entries(&self, limit: usize) -> Vec<(&'a str, Cursor<'a>)> {
        let Value::Map(fields) = &self.node.value else {
            self.wrong_type("a map");
            return Vec::new();
        };
        if fields.len() > limit {
            self.error(format!("{} entries, more than the {limit} allowed", fields.len()));
        }
        let entry = |(key, node): &'a (Key, Node)| {
            let path = format!("{}[{}]", self.path, clip(&key.text));
            (key.text.as_str(), Cursor::new(self.report, node, path))
        };
        fields.iter().take(limit).map(entry).collect()
    }

    /// A map with known fields; those that `read` did not ask for are reported.
    pub(super) fn object<T>(&self, read: impl FnOnce(&mut Object<'a>) -> Option<T>) -> Option<T> {
        let Value::Map(fields) = &self.node.value else {
            self.wrong_type("a map");
            return None;
        };
        let mut object = Object { at: self.clone(), fields, known: Vec::new(), all_known: false };
        let value = read(&mut object);
        object.report_unknown();
        value
    }
}

/// The fields of a map. Each field asked for is known; the rest are errors.
pub(super) struct Object<'a> {
    pub(super) at: Cursor<'a>,
    fields: &'a [(Key, Node)],
    known: Vec<&'static str>,
    all_known: bool,
}

impl<'a> Object<'a> {
    fn find(&self, name: &str) -> Option<Cursor<'a>> {
        let (key, node) = self.fields.iter().find(|(key, _)| key.text == name)?;
        let path = self.child_path(&key.text);
        Some(Cursor::new(self.at.report, node, path))
    }

    fn child_path(&self, name: &str) -> String {
        if self.at.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.at.path) }
    }

    /// The field, if it is written and not null.
    pub(super) fn optional(&mut self, name: &'static str) -> Option<Cursor<'a>> {
        self.known.push(name);
        self.find(name).filter(|cursor| !cursor.is_null())
    }

    /// The field; its absence is reported.
    pub(super) fn required(&mut self, name: &'static str) -> Option<Cursor<'a>> {
        let found = self.optional(name);
        if found.is_none() {
            self.at.error(format!("the field '{name}' is missing"));
        }
        found
    }

    /// A field that exists and has no meaning here.
    pub(super) fn ignore(&mut self, name: &'static str) {
        self.known.push(name);
    }

    /// Fields that the API has and Sheer does not carry yet: refused, since ignoring them would change their meaning.
    pub(super) fn not_yet(&mut self, names: &[&'static str]) {
        for name in names {
            if let Some(cursor) = self.optional(name) {
                cursor.error_help(format!("'{name}' is not supported yet"), "remove it");
            }
        }
    }

    /// Treats every other field as known, because what they should be is unknown.
    pub(super) fn take_rest(&mut self) {
        self.all_known = true;
    }

    fn report_unknown(&self) {
        if self.all_known {
            return;
        }
        for (key, _) in self.fields.iter().filter(|(key, _)| !self.known.contains(&key.text.as_str())) {
            let help = match nearest(&key.text, self.known.iter().copied()) {
                Some(name) => format!("did you mean '{name}'?"),
                None => format!("known here: {}", self.known.join(", ")),
            };
            let path = self.child_path(clip(&key.text).as_str());
            let message = format!("unknown field '{}'", clip(&key.text));
            self.at.report.push((key.line, key.column), Severity::Error, &path, message, Some(help));
        }
    }
}

/// What YAML's core schema makes of a scalar.
fn scalar_type(text: &str, plain: bool) -> &'static str {
    if !plain {
        return "the text";
    }
    let number = || {
        let digits = text.trim_start_matches(['-', '+']);
        digits.starts_with(|c: char| c.is_ascii_digit() || c == '.')
            && (digits.parse::<f64>().is_ok() || digits.starts_with("0x") || digits.starts_with("0o"))
    };
    match text {
        "true" | "True" | "TRUE" | "false" | "False" | "FALSE" => "the boolean",
        "" | "~" | "null" | "Null" | "NULL" => "the empty value",
        _ if text.len() <= 40 && number() => "the number",
        _ => "the text",
    }
}

/// The name nearest to a misspelled one, if any is near enough to suggest.
pub(super) fn nearest<'n>(text: &str, names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    if text.len() > 64 {
        return None;
    }
    let lower = text.to_lowercase();
    let distance = |name: &str| strsim::damerau_levenshtein(&lower, &name.to_lowercase());
    let (near, name) = names.map(|name| (distance(name), name)).min()?;
    (near <= 1 + name.len() / 4).then_some(name)
}

/// At most 60 characters of a text, made fit for a message: a configuration may hold a megabyte in one name.
pub(super) fn clip(text: &str) -> String {
    clip_to(60, text)
}

/// The same, of another length.
pub(super) fn clip_to(limit: usize, text: &str) -> String {
    let mut chars = text.chars();
    let mut clipped: String = chars.by_ref().take(limit).flat_map(printable).collect();
    if chars.next().is_some() {
        clipped.push_str("...");
    }
    clipped
}

fn printable(c: char) -> impl Iterator<Item = char> {
    let escape = c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
    let escaped = escape.then(|| c.escape_unicode());
    let plain = (!escape).then_some(c);
    escaped.into_iter().flatten().chain(plain)
}

fn one_of(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [only] => (*only).to_owned(),
        [front @ .., last] => format!("{} or {last}", front.join(", ")),
    }
}
