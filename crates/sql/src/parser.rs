//! Our statements, parsed with positions.

use pgerror::{PgError, SqlState};
use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::keywords::Keyword;
use sqlparser::tokenizer::{Location, Token, TokenWithSpan, Tokenizer};

use crate::scan::starts_ours;

/// One statement of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statement {
    /// `SHOW LOCALITY`: the gateway's locality.
    ShowLocality,
    /// `SHOW NODES`: every node that the fleet knows.
    ShowNodes,
}

impl Statement {
    /// The command tag that its completion is reported with.
    pub fn tag(self) -> &'static str {
        match self {
            Self::ShowLocality | Self::ShowNodes => "SHOW",
        }
    }
}

/// Parses a text that [`crate::is_ours`] accepted into its statements, in order.
///
/// A text may hold several of our statements, which then run one by one. A statement of PostgreSQL among them is
/// refused (0A000): its server would have to run it as part of one implicit transaction that it never sees whole.
///
/// # Errors
///
/// 42601 in CockroachDB's form (`at or near "x": syntax error`, a caret under the place in the DETAIL) with the
/// position; 0A000 for a mixed text.
pub fn parse(text: &str) -> Result<Vec<Statement>, PgError> {
    let tokens = Tokenizer::new(&PostgreSqlDialect {}, text)
        .tokenize_with_location()
        .map_err(|error| syntax_error(text, error.location, &error.message))?;
    let mut cursor = Cursor { text, tokens: &tokens, next: 0 };
    let mut statements = Vec::new();
    loop {
        while cursor.eat(&Token::SemiColon) {}
        if *cursor.peek() == Token::EOF {
            return Ok(statements);
        }
        statements.push(cursor.statement()?);
        if *cursor.peek() != Token::SemiColon && *cursor.peek() != Token::EOF {
            return Err(cursor.unexpected());
        }
    }
}

struct Cursor<'t> {
    text: &'t str,
    tokens: &'t [TokenWithSpan],
    next: usize,
}

impl Cursor<'_> {
    fn statement(&mut self) -> Result<Statement, PgError> {
        if !self.at_ours() {
            return Err(self.mixed());
        }
        self.next_token();
        let statement = match self.next_token() {
            Token::Word(word) if word.value.eq_ignore_ascii_case("LOCALITY") => Statement::ShowLocality,
            Token::Word(word) if word.value.eq_ignore_ascii_case("NODES") => Statement::ShowNodes,
            _ => return Err(self.unexpected()),
        };
        Ok(statement)
    }

    fn at_ours(&self) -> bool {
        let word = |nth: usize| match self.significant().nth(nth) {
            Some(Token::Word(word)) if word.quote_style.is_none() => word.value.as_bytes(),
            _ => b"".as_slice(),
        };
        starts_ours(word(0), word(1))
    }

    fn mixed(&self) -> PgError {
        let (location, _) = self.place();
        PgError::new(
            SqlState::FEATURE_NOT_SUPPORTED,
            "statements of Backhaul and of PostgreSQL cannot be combined in one query string",
        )
        .hint("Send each statement on its own.")
        .at(position(self.text, location))
    }

    fn unexpected(&self) -> PgError {
        let (location, token) = self.place();
        let near = match token {
            Token::EOF => "EOF".to_owned(),
            token => token.to_string(),
        };
        syntax_error(self.text, location, &near)
    }

    fn significant(&self) -> impl Iterator<Item = &Token> {
        let rest = self.tokens.get(self.next..).unwrap_or_default();
        rest.iter().map(|t| &t.token).filter(|t| !matches!(t, Token::Whitespace(_)))
    }

    fn peek(&self) -> &Token {
        self.significant().next().unwrap_or(&Token::EOF)
    }

    /// The next token that is not white space, and where it begins.
    fn place(&self) -> (Location, &Token) {
        let rest = self.tokens.get(self.next..).unwrap_or_default();
        match rest.iter().find(|t| !matches!(t.token, Token::Whitespace(_))) {
            Some(found) if found.token != Token::EOF => (found.span.start, &found.token),
            _ => (end_of(self.text), &Token::EOF),
        }
    }

    fn next_token(&mut self) -> &Token {
        while let Some(found) = self.tokens.get(self.next) {
            self.next += 1;
            if !matches!(found.token, Token::Whitespace(_)) {
                return &found.token;
            }
        }
        &Token::EOF
    }

    fn eat(&mut self, wanted: &Token) -> bool {
        let found = self.peek() == wanted;
        if found {
            self.next_token();
        }
        found
    }
}

/// CockroachDB's form of a syntax error, with PostgreSQL's position beside it.
fn syntax_error(text: &str, location: Location, near: &str) -> PgError {
    let position = position(text, location);
    let line = text.lines().nth((location.line.max(1) - 1) as usize).unwrap_or_default();
    let caret = " ".repeat((location.column.max(1) - 1) as usize);
    let shown = match text.lines().count() {
        0 | 1 => line.to_owned(),
        _ => text.lines().take(location.line as usize).collect::<Vec<_>>().join("\n"),
    };
    PgError::new(SqlState::SYNTAX_ERROR, format!("at or near \"{near}\": syntax error"))
        .detail(format!("source SQL:\n{shown}\n{caret}^"))
        .hint(format!("try \\h {}", first_word(text)))
        .at(position)
}

fn first_word(text: &str) -> String {
    let words = Tokenizer::new(&PostgreSqlDialect {}, text).tokenize().unwrap_or_default();
    let word = words.into_iter().find_map(|token| match token {
        Token::Word(word) if word.keyword != Keyword::NoKeyword => Some(word.value.to_ascii_uppercase()),
        _ => None,
    });
    word.unwrap_or_else(|| "SHOW".to_owned())
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
    use super::*;

    #[test]
    fn statements_are_read_in_order() {
        use Statement::{ShowLocality, ShowNodes};
        for (text, expected) in [
            ("SHOW LOCALITY", vec![ShowLocality]),
            ("show nodes ;", vec![ShowNodes]),
            (";; SHOW LOCALITY; /* and */ SHOW NODES;", vec![ShowLocality, ShowNodes]),
        ] {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn a_syntax_error_points_at_its_character() {
        for (text, message, position, caret) in [
            ("SHOW LOCALITY now", "at or near \"now\": syntax error", 15, "SHOW LOCALITY now\n              ^"),
            ("/* é日本 */ SHOW NODES 'x'", "at or near \"'x'\": syntax error", 22, "^"),
            ("SHOW NODES;\nSHOW LOCALITY (", "at or near \"(\": syntax error", 27, "SHOW LOCALITY (\n              ^"),
            ("SHOW NODES 'open", "at or near", 12, "^"),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!(error.code, SqlState::SYNTAX_ERROR);
            assert!(error.message.starts_with(message), "{text}: {}", error.message);
            assert_eq!(error.position, Some(position), "{text}");
            let detail = error.detail.unwrap_or_default();
            assert!(detail.starts_with("source SQL:\n") && detail.ends_with(caret), "{text}: {detail}");
            assert_eq!(error.hint.as_deref(), Some("try \\h SHOW"));
        }
    }

    #[test]
    fn a_text_that_mixes_ours_and_theirs_is_refused() {
        let error = parse("SHOW NODES; SELECT 1").expect_err("mixed");
        assert_eq!((error.code, error.position), (SqlState::FEATURE_NOT_SUPPORTED, Some(13)));
    }
}
