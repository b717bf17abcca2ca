//! What is wrong with a configuration, where, and how to mend it.

use serde::{Deserialize, Serialize};
use std::fmt;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The configuration cannot come into force; the one before it stays.
    Error,
    /// It can, but part of it does nothing or not what it seems to say.
    Warning,
}

/// One finding about a configuration file. It orders by place, then by what it says.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Diagnostic {
    /// The file as it was named to the compiler.
    pub file: String,
    /// Line, from 1; 0 when the finding is about the file as a whole.
    pub line: u32,
    /// Column in characters, from 1; 0 when the finding is about the file as a whole.
    pub column: u32,
    /// Error or warning.
    pub severity: Severity,
    /// The field, like `spec.rules[0].backendRefs[0].port`; empty when it is about the whole document.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// How to mend it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// The service, `NAMESPACE/NAME`, that no document writes: the finding is void while a workload names it.
    #[serde(skip)]
    pub awaits: Option<String>,
}

impl Diagnostic {
    /// Whether it keeps the configuration from coming into force.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

/// One line, in the form of compilers: `FILE:LINE:COLUMN: error: FIELD: what is wrong; how to mend it`.
impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        f.write_str(match self.severity {
            Severity::Error => ": error: ",
            Severity::Warning => ": warning: ",
        })?;
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)?;
        match &self.help {
            Some(help) => write!(f, "; {help}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_like_a_compilers_and_travels_as_json() {
        let mut diagnostic = Diagnostic {
            file: "web.yaml".into(),
            line: 3,
            column: 7,
            severity: Severity::Error,
            path: "spec.ports[0].port".into(),
            message: "99999 is no port".into(),
            help: Some("write 1 to 65535".into()),
            awaits: None,
        };
        assert_eq!(
            diagnostic.to_string(),
            "web.yaml:3:7: error: spec.ports[0].port: 99999 is no port; write 1 to 65535"
        );
        let json = serde_json::to_string(&diagnostic).unwrap();
        assert_eq!(serde_json::from_str::<Diagnostic>(&json).unwrap(), diagnostic);
        diagnostic = Diagnostic { line: 0, column: 0, path: String::new(), help: None, ..diagnostic };
        assert_eq!(diagnostic.to_string(), "web.yaml: error: 99999 is no port");
    }
}
