//! Files of statements with what is said of each: blocks between blank lines, notes behind `#`, the statement, a line
//! `----`, and the answer.

/// A block of a file.
pub(crate) struct Case<'f> {
    /// The statement.
    pub(crate) statement: String,
    /// The answer as the file has it.
    pub(crate) answer: &'f str,
}

/// The blocks of a file that have a statement.
pub(crate) fn cases(file: &str) -> impl Iterator<Item = Case<'_>> {
    file.split("\n\n").filter_map(|block| {
        let (asked, answer) = block.split_once("\n----\n")?;
        let lines: Vec<&str> = asked.trim_start().lines().filter(|line| !line.starts_with('#')).collect();
        Some(Case { statement: lines.join("\n"), answer: answer.trim_end() })
    })
}
