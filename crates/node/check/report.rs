//! What a check found, as it travels from the node that was asked and as it is printed.

use fleet::readiness::{Finding, Severity};
use serde::{Deserialize, Serialize};

/// Findings that belong together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Part {
    /// A node with its server, or the fleet.
    pub(super) title: String,
    /// What was found there, the gravest first.
    pub(super) findings: Vec<Finding>,
}

/// Everything that was found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) parts: Vec<Part>,
    /// What the reader has to know of the whole.
    #[serde(default)]
    pub(super) note: Option<String>,
}

impl Report {
    /// Whether anything is missing; advice alone is no failure.
    pub(super) fn is_sound(&self) -> bool {
        self.count(Severity::Missing) == 0
    }

    fn count(&self, severity: Severity) -> usize {
        self.parts.iter().flat_map(|part| &part.findings).filter(|finding| finding.severity == severity).count()
    }

    /// The lines to print: what is to be typed stands furthest to the right, and nothing else does.
    pub(super) fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for part in &self.parts {
            lines.push(part.title.clone());
            part.findings.iter().for_each(|finding| print(finding, &mut lines));
        }
        lines.push(format!("{} missing, {} advised", self.count(Severity::Missing), self.count(Severity::Advice)));
        lines.extend(self.note.clone());
        lines
    }
}

fn print(finding: &Finding, lines: &mut Vec<String>) {
    lines.push(format!("  {:7}  {}", finding.severity, finding.what));
    for step in &finding.steps {
        lines.push(format!("           {}", step.place));
        lines.extend(step.lines.iter().map(|line| format!("               {line}")));
    }
}

#[cfg(test)]
mod tests {
    use fleet::readiness::Place;

    use super::*;

    #[test]
    fn what_is_to_be_typed_stands_alone() {
        let findings = vec![
            Finding::missing("it is off").mended(Place::Server, ["SELECT 1;", "SELECT 2;"]),
            Finding::advice("it is late"),
        ];
        let report = Report { parts: vec![Part { title: "node 1".to_owned(), findings }], note: None };
        assert!(!report.is_sound());
        let expected = [
            "node 1",
            "  missing  it is off",
            "           in psql on this server, as a superuser:",
            "               SELECT 1;",
            "               SELECT 2;",
            "  advice   it is late",
            "1 missing, 1 advised",
        ];
        assert_eq!(report.lines(), expected);
        assert!(Report::default().is_sound());
    }
}
