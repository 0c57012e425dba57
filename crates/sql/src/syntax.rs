//! What is wrong with a text, and where, in CockroachDB's form with PostgreSQL's position.
//!
//! The DETAIL echoes the text with a caret under the place, which is a great help, and a danger: a statement of ours
//! may hold a store's keys. So whatever looks like the secret part of a URI, and the passphrase of a backup, is
//! overwritten with stars of the same length; the caret still points true.

use pgerror::{PgError, SqlState};
use sqlparser::tokenizer::{Location, Token, TokenWithSpan};

/// The longest text, in characters, that an error echoes. Of a longer one it gives only the position.
const ECHO_MAX: usize = 8192;

/// The longest token, in characters, that a message names. A longer one is cut.
const NEAR_MAX: usize = 200;

/// A text and its tokens: all of them, or those before the place where it cannot be tokenized.
#[derive(Clone, Copy)]
pub(crate) struct Source<'t> {
    pub(crate) text: &'t str,
    pub(crate) tokens: &'t [TokenWithSpan],
}

impl Source<'_> {
    /// A syntax error at a token, or at the end; `why` says more than that it is wrong.
    pub(crate) fn error(&self, index: Option<usize>, topic: &str, why: Option<&str>) -> PgError {
        self.error_at(self.location(index), &self.near(index), topic, why)
    }

    /// A syntax error at a place that need not be a token.
    pub(crate) fn error_at(&self, location: Location, near: &str, topic: &str, why: Option<&str>) -> PgError {
        let why = why.map(|why| format!(": {why}")).unwrap_or_default();
        let error = PgError::new(SqlState::SYNTAX_ERROR, format!("at or near \"{near}\": syntax error{why}"))
            .hint(format!("try \\h {topic}"))
            .at(position(self.text, location));
        if self.text.chars().nth(ECHO_MAX).is_some() {
            return error;
        }
        let echo = self.veiled();
        let shown = echo.split('\n').take(location.line.max(1) as usize).collect::<Vec<_>>().join("\n");
        let caret = " ".repeat((location.column.max(1) - 1) as usize);
        error.detail(format!("source SQL:\n{shown}\n{caret}^"))
    }

    /// Where a token begins; the end of the text for none.
    pub(crate) fn location(&self, index: Option<usize>) -> Location {
        index.and_then(|index| self.tokens.get(index)).map_or_else(|| end_of(self.text), |token| token.span.start)
    }

    /// The position of a token, as an ErrorResponse carries it.
    pub(crate) fn position(&self, index: Option<usize>) -> usize {
        position(self.text, self.location(index))
    }

    /// The text from a token up to another one, or to the end, without the white space around it.
    pub(crate) fn between(&self, mark: &mut Mark, from: Option<usize>, to: Option<usize>) -> (usize, String) {
        let (start, before) = mark.advance(self.text, self.location(from));
        let (end, _) = mark.advance(self.text, self.location(to));
        (before, self.text[start..end].trim_end().to_owned())
    }

    /// A token as CockroachDB names it: the inside of a literal, the number of a placeholder.
    fn near(&self, index: Option<usize>) -> String {
        let token = index.and_then(|index| self.tokens.get(index)).map_or(&Token::EOF, |token| &token.token);
        let said = match token {
            // A statement ends before its semicolon.
            Token::EOF | Token::SemiColon => return "EOF".to_owned(),
            Token::Placeholder(placeholder) => placeholder.trim_start_matches('$').to_owned(),
            Token::Word(word) => word.value.clone(),
            token => literal(token).map_or_else(|| token.to_string(), str::to_owned),
        };
        if index.is_some_and(|index| self.is_passphrase(index)) {
            return "*****".to_owned();
        }
        let mut said: Vec<char> = said.chars().collect();
        veil(&mut said);
        match said.get(..NEAR_MAX) {
            Some(start) => start.iter().chain(['…'].iter()).collect(),
            None => said.iter().collect(),
        }
    }

    /// The text with stars for its secrets, character for character.
    fn veiled(&self) -> String {
        let mut chars: Vec<char> = self.text.chars().collect();
        let starts: Vec<usize> = [0].into_iter().chain(line_breaks(&chars).map(|at| at + 1)).collect();
        let offset = |location: Location| {
            let line = starts.get((location.line.max(1) - 1) as usize).copied().unwrap_or(chars.len());
            (line + location.column.max(1) as usize - 1).min(chars.len())
        };
        let mut spans: Vec<_> = self.tokens.iter().map(|t| offset(t.span.start)..offset(t.span.end)).collect();
        // What could not be tokenized is most likely a literal that never ends.
        spans.push(spans.last().map_or(0, |last| last.end)..chars.len());
        for (index, span) in spans.into_iter().enumerate() {
            match self.is_passphrase(index) {
                true => cover(&mut chars[span]),
                false => veil(&mut chars[span]),
            }
        }
        veil_unquoted(&mut chars);
        chars.into_iter().collect()
    }

    /// Whether this token may be a passphrase, or a part of one: whatever stands behind the option's name may, because
    /// what is mistyped, a quote say, turns the rest of a text into something else.
    fn is_passphrase(&self, index: usize) -> bool {
        let is_option = |token: &TokenWithSpan| match &token.token {
            Token::Word(word) => word.value.eq_ignore_ascii_case("encryption_passphrase"),
            _ => false,
        };
        self.tokens.get(..index).unwrap_or_default().iter().any(is_option)
    }
}

/// A place in a text up to which bytes and characters have been counted, so that what follows is not counted from the
/// start.
#[derive(Clone)]
pub(crate) struct Mark {
    location: Location,
    byte: usize,
    chars: usize,
}

impl Mark {
    pub(crate) fn new() -> Self {
        Self { location: Location { line: 1, column: 1 }, byte: 0, chars: 0 }
    }

    /// How many bytes and characters there are before a location that is not before the mark.
    fn advance(&mut self, text: &str, to: Location) -> (usize, usize) {
        for char in text[self.byte..].chars() {
            if (self.location.line, self.location.column) >= (to.line, to.column) {
                break;
            }
            self.byte += char.len_utf8();
            self.chars += 1;
            self.location = match char {
                '\n' => Location { line: self.location.line + 1, column: 1 },
                _ => Location { line: self.location.line, column: self.location.column + 1 },
            };
        }
        (self.byte, self.chars)
    }
}

/// What a token says that is a literal.
pub(crate) fn literal(token: &Token) -> Option<&str> {
    match token {
        Token::SingleQuotedString(text) | Token::EscapedStringLiteral(text) => Some(text),
        Token::DollarQuotedString(quoted) => Some(&quoted.value),
        _ => None,
    }
}

/// Covers what may be secret in a URI: the user's part of its authority, and its query.
fn veil(uri: &mut [char]) {
    let query = uri.iter().position(|c| *c == '?').unwrap_or(uri.len());
    let authority = uri[..query].windows(3).position(|three| three == [':', '/', '/']).map(|at| at + 3);
    if let Some(start) = authority
        && let Some(len) = uri[start..query].iter().rposition(|c| *c == '@')
    {
        cover(&mut uri[start..start + len]);
    }
    let end = if uri.last() == Some(&'\'') { uri.len() - 1 } else { uri.len() };
    if query + 1 < end {
        cover(&mut uri[query + 1..end]);
    }
}

/// Does the same for URIs whose quotes were forgotten.
fn veil_unquoted(chars: &mut [char]) {
    let mut from = 0;
    while let Some(at) = chars[from..].windows(3).position(|three| three == [':', '/', '/']) {
        let start = from + at;
        let len = chars[start..].iter().position(|c| c.is_whitespace() || matches!(c, '\'' | '"'));
        from = len.map_or(chars.len(), |len| start + len);
        veil(&mut chars[start..from]);
    }
}

fn cover(chars: &mut [char]) {
    chars.iter_mut().filter(|c| **c != '\n').for_each(|c| *c = '*');
}

fn line_breaks(chars: &[char]) -> impl Iterator<Item = usize> {
    chars.iter().enumerate().filter(|(_, c)| **c == '\n').map(|(at, _)| at)
}

fn end_of(text: &str) -> Location {
    let line = text.matches('\n').count() + 1;
    let column = text.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    Location { line: line as u64, column: column as u64 }
}

/// Line and column as the 1-based character index that an ErrorResponse carries.
fn position(text: &str, location: Location) -> usize {
    let before: usize =
        text.split_inclusive('\n').take((location.line.max(1) - 1) as usize).map(|line| line.chars().count()).sum();
    before + location.column.max(1) as usize
}

#[cfg(test)]
mod tests {
    use super::ECHO_MAX;
    use crate::parse;

    #[test]
    fn the_echo_of_a_text_holds_no_secrets() {
        for text in [
            "BACKUP DATABASE a INTO 's3://b/p?AWS_SECRET_ACCESS_KEY=hunter2' WITH x",
            "BACKUP DATABASE a INTO ('s3://b/p?KEY=it''s hunter2&B=C' x",
            "BACKUP DATABASE a INTO E's3://b/p?KEY=it\\'s hunter2' x",
            "BACKUP DATABASE a INTO $$s3://b/p?KEY='hunter2'$$ x",
            "BACKUP DATABASE a INTO \"s3://b/p?KEY=hunter2\" x",
            "BACKUP DATABASE a INTO 'https://me:hunter2@host/p' x",
            "BACKUP DATABASE a INTO 'https://me:hunt/hunter2@host/p?x' x",
            "BACKUP DATABASE a INTO s3://b?KEY=hunter2",
            "BACKUP DATABASE a INTO 's3://b/p?KEY=hunter2",
            "BACKUP DATABASE a INTO $x$s3://b/p?KEY=\nhunter2",
            "BACKUP DATABASE a TO 's3://b/p?KEY=hunter2'",
            "BACKUP DATABASE a INTO 'x' 's3://b/p?KEY=hunter2'",
            "RESTORE DATABASE a FROM 's3://b/p?KEY=hunter2'",
            "RESTORE DATABASE a FROM LATEST 's3://b/p?KEY=hunter2'",
            "SHOW BACKUPS IN 's3://b/p?KEY=hunter2' x",
            "SHOW BACKUP 's3://b/p?KEY=hunter2' WITH encryption_passphrase = 'hunter2'",
            "BACKUP DATABASE a INTO 'x' /* 's3://b?KEY=hunter2' */ y",
            "BACKUP DATABASE a INTO 'x' WITH encryption_passphrase = /* no */ 'hunter2' x",
            "BACKUP DATABASE a INTO 'x' WITH encryption_passphrase='x', encryption_passphrase='hunter2'",
            "BACKUP DATABASE a INTO 'x' WITH encryption_passphrase='hunter2",
            "BACKUP DATABASE a INTO 'x' WITH encryption_passphrase 'hunter2'",
            "BACKUP DATABASE a INTO 'x' WITH encryption_passphrase hunter2",
            "BACKUP DATABASE a INTO 'x' WITH encryption_passphrase = ('hunter2')",
            "BACKUP DATABASE a INTO 'x' WITH encryption_passphrase == 'hunter2'",
            "BACKUP DATABASE a INTO 'x' WITH encryption_passphrase : 'x' 'hunter2' y",
            "BACKUP DATABASE a INTO 'x' WITH encryption_passphrase = 'don't tell hunter2'",
            "BACKUP DATABASE a INTO 'x' WITH encryption_passphrase => \"hunter2\"",
            "BACKUP DATABASE a INTO 'x' WITH encryption_passphrase = my-hunter2",
            "BACKUP DATABASE a INTO 'x' WITH encryption_passphrase 'it's, hunter2; hunter2'",
            "SHOW BACKUP LATEST IN 'x' WITH OPTIONS (encryption_passphrase $$hunter2",
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!(error.code.as_str(), "42601", "{text}");
            assert!(!format!("{error:?}").contains("hunter2"), "{text}: {error:?}");
        }
    }

    #[test]
    fn stars_keep_the_caret_in_its_place() {
        let error = parse("BACKUP DATABASE a INTO 's3://me:k@b/p?K=it''s' WITH x").expect_err("unknown option");
        let echo = "source SQL:\nBACKUP DATABASE a INTO 's3://****@b/p?*******' WITH x\n";
        assert_eq!(error.detail, Some(format!("{echo}{}^", " ".repeat(52))));
        assert_eq!(error.position, Some(53));
    }

    #[test]
    fn a_long_text_is_not_echoed() {
        let long = format!("BACKUP DATABASE a INTO '{}' 'y{}'", "x".repeat(ECHO_MAX), "z".repeat(1000));
        let error = parse(&long).expect_err("two literals");
        assert_eq!((error.detail, error.position), (None, Some(ECHO_MAX + 27)));
        assert!(error.message.len() < 300, "{}", error.message);
    }
}
