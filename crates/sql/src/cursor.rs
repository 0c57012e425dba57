//! A place in a tokenized text, and the small things that are read there: words, names, texts and numbers.
//!
//! Nothing here recurses, so no text is nested too deeply for it.

use pgerror::{PgError, SqlState};
use sqlparser::tokenizer::{Token, Word};

use crate::names::is_reserved;
use crate::parameters::{PARAMETERS_MAX, parse_int8};
use crate::scan::starts_ours;
use crate::selection::{Form, Query};
use crate::statement::{Number, Text};
use crate::syntax::{Mark, Source, literal};

/// The reserved words that an expression may begin with, but for `NULL`, which is an id here.
const BEGINS: [&str; 17] = [
    "ARRAY",
    "CASE",
    "CAST",
    "CURRENT_CATALOG",
    "CURRENT_DATE",
    "CURRENT_ROLE",
    "CURRENT_TIME",
    "CURRENT_TIMESTAMP",
    "CURRENT_USER",
    "FALSE",
    "LOCALTIME",
    "LOCALTIMESTAMP",
    "NOT",
    "SESSION_USER",
    "SYSTEM_USER",
    "TRUE",
    "USER",
];

/// A place in a text, with what is owed to the statement that is being read.
pub(crate) struct Cursor<'t> {
    source: Source<'t>,
    next: usize,
    /// The first token of the statement.
    begun: Option<usize>,
    /// What the statement asks for and cannot have, told once it is known to be sound: the first of it.
    refusal: Option<PgError>,
    /// How far the text was counted for queries that were cut out of it.
    mark: Mark,
    /// The text is a row source in so many others.
    depth: usize,
}

/// A place that a cursor was at.
pub(crate) struct Place {
    next: usize,
    mark: Mark,
}

impl<'t> Cursor<'t> {
    pub(crate) fn new(source: Source<'t>, depth: usize) -> Self {
        Self { source, next: 0, begun: None, refusal: None, mark: Mark::new(), depth }
    }

    /// Notes that a statement begins here.
    pub(crate) fn begin(&mut self) {
        self.begun = self.here();
    }

    /// Ends the statement: nothing may follow it but a semicolon, and what it cannot have is told now.
    pub(crate) fn finish(&mut self) -> Result<(), PgError> {
        if !self.at_end() {
            return Err(self.unexpected());
        }
        self.refusal.take().map_or(Ok(()), Err)
    }

    /// What a statement that cannot be had as a whole is answered with: what is wrong behind its end, else why not.
    pub(crate) fn refused(&mut self) -> PgError {
        self.finish().err().unwrap_or_else(|| self.unexpected())
    }

    /// Notes what contradicts itself in the statement: told before anything that it cannot have.
    pub(crate) fn refuse_first(&mut self, refusal: PgError) {
        self.refusal = Some(refusal);
    }

    /// Notes what the statement cannot have.
    pub(crate) fn refuse(&mut self, refusal: PgError) {
        self.refusal.get_or_insert(refusal);
    }

    /// An error about something that is understood and not available, here.
    pub(crate) fn unsupported(&self, what: impl Into<String>) -> PgError {
        self.unsupported_at(self.here(), what)
    }

    /// The same at a token that [`Cursor::here`] gave, for what is known only when more has been read.
    pub(crate) fn unsupported_at(&self, index: Option<usize>, what: impl Into<String>) -> PgError {
        PgError::new(SqlState::FEATURE_NOT_SUPPORTED, what).at(self.position(index))
    }

    /// A syntax error at the next token.
    pub(crate) fn unexpected(&self) -> PgError {
        self.source.error(self.here(), &self.topic(), None)
    }

    /// A syntax error at the next token that says why.
    pub(crate) fn wrong_here(&self, why: &str) -> PgError {
        self.source.error(self.here(), &self.topic(), Some(why))
    }

    /// A syntax error at the token just read that says why.
    pub(crate) fn wrong_before(&self, why: &str) -> PgError {
        let before = self.source.tokens.get(..self.next).unwrap_or_default();
        let index = before.iter().rposition(|t| !matches!(t.token, Token::Whitespace(_)));
        self.source.error(index, &self.topic(), Some(why))
    }

    /// The position of a token that [`Cursor::here`] gave. Counted from the start of the text, so only for errors.
    pub(crate) fn position(&self, index: Option<usize>) -> usize {
        self.source.position(index)
    }

    /// What `\h` is to be asked about: the statement's first word.
    pub(crate) fn topic(&self) -> String {
        let first = self.source.tokens.get(self.begun.unwrap_or_default()..).unwrap_or_default();
        let word = first.iter().find_map(|token| match &token.token {
            Token::Word(word) => Some(word.value.to_ascii_uppercase()),
            _ => None,
        });
        word.unwrap_or_else(|| "SHOW".to_owned())
    }

    /// Whether the words here begin a statement of ours.
    pub(crate) fn at_ours(&self) -> bool {
        let mut rest = self.significant().peekable();
        let word = |token: &'t Token| match token {
            Token::Comma => Some(b",".as_slice()),
            token => bare(token).map(|word| word.value.as_bytes()),
        };
        starts_ours(|| rest.next().and_then(word)) && rest.peek() != Some(&&Token::Period)
    }

    pub(crate) fn at_end(&self) -> bool {
        matches!(self.peek(), Token::SemiColon | Token::EOF)
    }

    pub(crate) fn at(&self, wanted: &Token) -> bool {
        self.peek() == wanted
    }

    pub(crate) fn at_word(&self, wanted: &str) -> bool {
        is_word(self.peek(), wanted)
    }

    /// Whether these words come next.
    pub(crate) fn at_words(&self, wanted: &[&str]) -> bool {
        let mut tokens = self.significant();
        wanted.iter().all(|wanted| tokens.next().is_some_and(|token| is_word(token, wanted)))
    }

    /// The token after the next.
    pub(crate) fn second(&self) -> &'t Token {
        self.significant().nth(1).unwrap_or(&Token::EOF)
    }

    pub(crate) fn eat(&mut self, wanted: &Token) -> bool {
        let found = self.at(wanted);
        if found {
            self.advance();
        }
        found
    }

    pub(crate) fn eat_words(&mut self, wanted: &[&str]) -> bool {
        let found = self.at_words(wanted);
        if found {
            wanted.iter().for_each(|_| self.advance());
        }
        found
    }

    pub(crate) fn eat_word(&mut self, wanted: &str) -> bool {
        self.eat_words(&[wanted])
    }

    pub(crate) fn expect(&mut self, wanted: &Token) -> Result<(), PgError> {
        if self.eat(wanted) { Ok(()) } else { Err(self.unexpected()) }
    }

    pub(crate) fn expect_words(&mut self, wanted: &[&str]) -> Result<(), PgError> {
        wanted.iter().try_for_each(|wanted| if self.eat_word(wanted) { Ok(()) } else { Err(self.unexpected()) })
    }

    /// A name: folded to lower case unless quoted.
    pub(crate) fn name(&mut self) -> Result<String, PgError> {
        let name = match self.peek() {
            Token::Word(Word { value, quote_style: Some(_), .. }) if !value.is_empty() => value.clone(),
            Token::Word(Word { value, quote_style: None, .. }) if !is_reserved(value) => value.to_ascii_lowercase(),
            _ => return Err(self.unexpected()),
        };
        self.advance();
        Ok(name)
    }

    /// A literal, a word, or a placeholder.
    pub(crate) fn text(&mut self) -> Result<Text, PgError> {
        if let Some(n) = self.placeholder() {
            return Ok(Text::Placeholder(n));
        }
        let Some(text) = literal(self.peek()) else { return self.name().map(Text::Literal) };
        self.advance();
        Ok(Text::Literal(text.to_owned()))
    }

    /// One text, or several in parentheses; never none.
    pub(crate) fn texts(&mut self) -> Result<Vec<Text>, PgError> {
        if !self.eat(&Token::LParen) {
            return Ok(vec![self.text()?]);
        }
        let mut texts = vec![self.text()?];
        while self.eat(&Token::Comma) {
            texts.push(self.text()?);
        }
        self.expect(&Token::RParen)?;
        Ok(texts)
    }

    /// The id of a job. A cast to `int8` is allowed, since drivers write `$1::int8`.
    pub(crate) fn number(&mut self) -> Result<Number, PgError> {
        let begun = self.here();
        let number = if let Some(n) = self.placeholder() {
            Number::Placeholder(n)
        } else if self.eat_word("NULL") {
            Number::Null
        } else {
            let digits = self.digits()?;
            Number::Literal(parse_int8(&digits).map_err(|error| error.at(self.position(begun)))?)
        };
        if self.eat(&Token::DoubleColon) && !["INT8", "BIGINT", "INT"].iter().any(|name| self.eat_word(name)) {
            return Err(self.unexpected());
        }
        Ok(number)
    }

    /// Reads over a number.
    pub(crate) fn eat_number(&mut self) -> bool {
        let found = matches!(self.peek(), Token::Number(..));
        if found {
            self.advance();
        }
        found
    }

    /// A number as it is written, with its sign.
    pub(crate) fn signed_number(&mut self) -> Option<String> {
        let sign = if self.at(&Token::Minus) { "-" } else { "" };
        let number = if sign.is_empty() { self.peek() } else { self.second() };
        let Token::Number(digits, _) = number else { return None };
        self.eat(&Token::Minus);
        self.advance();
        Some(format!("{sign}{digits}"))
    }

    /// An expression of PostgreSQL that stands for one value: all up to what cannot be part of it, which is a comma, a
    /// parenthesis or bracket that it did not open, `WITH`, or the end.
    pub(crate) fn value(&mut self) -> Result<Query, PgError> {
        let begun = self.here();
        let mut depth = 0_usize;
        loop {
            match self.peek() {
                Token::EOF | Token::SemiColon if depth > 0 => return Err(self.unexpected()),
                Token::EOF | Token::SemiColon => break,
                Token::Comma | Token::RParen | Token::RBracket if depth == 0 => break,
                // TIMESTAMP WITH TIME ZONE is one type.
                token if depth == 0 && is_word(token, "WITH") && !is_word(self.second(), "TIME") => break,
                Token::LParen | Token::LBracket => depth += 1,
                Token::RParen | Token::RBracket => depth -= 1,
                _ => {}
            }
            self.advance();
        }
        if self.here() == begun { Err(self.unexpected()) } else { self.cut(begun, Form::Expression) }
    }

    /// A place to which [`Cursor::return_to`] goes back.
    pub(crate) fn place(&self) -> Place {
        Place { next: self.next, mark: self.mark.clone() }
    }

    /// Whether just one token was read since [`Cursor::here`] gave this.
    pub(crate) fn is_just_behind(&self, begun: Option<usize>) -> bool {
        begun.is_some_and(|begun| self.next == begun + 1)
    }

    /// Whether nothing was read since.
    pub(crate) fn is_at(&self, place: &Place) -> bool {
        self.next == place.next
    }

    /// Goes back to a place that was passed.
    pub(crate) fn return_to(&mut self, place: Place) {
        (self.next, self.mark) = (place.next, place.mark);
    }

    /// Whether a word comes next that an expression may begin with: a name, of a column or a function, say, what is written
    /// as one, or a reserved word that stands for a value.
    pub(crate) fn at_expression(&self) -> bool {
        let is_name = |word: &Word| word.quote_style.is_some() || !is_reserved(&word.value);
        BEGINS.iter().any(|word| self.at_word(word)) || matches!(self.peek(), Token::Word(word) if is_name(word))
    }

    /// Whether an operator that follows a value comes next.
    pub(crate) fn at_operator(&self) -> bool {
        use Token::{Caret, Div, DoubleColon, LBracket, Minus, Mod, Mul, Plus, StringConcat};
        matches!(self.peek(), Plus | Minus | Mul | Div | Mod | Caret | StringConcat | DoubleColon | LBracket)
    }

    /// Whether one of these words comes next but for the parentheses before it, of which there are some.
    pub(crate) fn is_query_in_parentheses(&self, words: &[&str]) -> bool {
        let mut rest = self.significant().skip_while(|token| **token == Token::LParen);
        self.at(&Token::LParen) && rest.next().is_some_and(|token| words.iter().any(|word| is_word(token, word)))
    }

    /// A query of PostgreSQL: all up to the end or `WITH REASON =`, or, when it stands for one value, one pair of
    /// parentheses with what is in them.
    pub(crate) fn query(&mut self, form: Form) -> Result<Query, PgError> {
        let begun = self.here();
        let mut depth = 0_usize;
        loop {
            match self.peek() {
                Token::EOF | Token::SemiColon if depth > 0 || self.here() == begun => return Err(self.unexpected()),
                Token::EOF | Token::SemiColon => break,
                Token::RParen if depth == 0 => return Err(self.unexpected()),
                Token::Word(_) if depth == 0 && self.at_reason() => break,
                Token::LParen => depth += 1,
                Token::RParen => depth -= 1,
                _ => {}
            }
            self.advance();
            if form == Form::Value && depth == 0 {
                break;
            }
        }
        self.cut(begun, form)
    }

    /// What was read from `begun` on, as a query.
    fn cut(&mut self, begun: Option<usize>, form: Form) -> Result<Query, PgError> {
        let end = self.here();
        let (before, text) = self.source.between(&mut self.mark, begun, end);
        Query::new(&text, before, form, self.depth)
    }

    /// Whether `WITH REASON =` comes next. `WITH reason AS` begins a query.
    pub(crate) fn at_reason(&self) -> bool {
        self.at_words(&["WITH", "REASON"]) && self.significant().nth(2) == Some(&Token::Eq)
    }

    fn digits(&mut self) -> Result<String, PgError> {
        if let Some(text) = literal(self.peek()) {
            self.advance();
            return Ok(text.to_owned());
        }
        let sign = if self.eat(&Token::Minus) { "-" } else { "" };
        if sign.is_empty() {
            self.eat(&Token::Plus);
        }
        let Token::Number(digits, _) = self.peek() else { return Err(self.unexpected()) };
        self.advance();
        Ok(format!("{sign}{digits}"))
    }

    /// The number of a placeholder.
    pub(crate) fn placeholder(&mut self) -> Option<usize> {
        let Token::Placeholder(text) = self.peek() else { return None };
        let digits = text.strip_prefix('$').filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))?;
        let n = digits.parse().ok().filter(|n| (1..=PARAMETERS_MAX).contains(n))?;
        self.advance();
        Some(n)
    }

    /// The next token.
    pub(crate) fn peek(&self) -> &'t Token {
        self.significant().next().unwrap_or(&Token::EOF)
    }

    /// Reads over the next token.
    pub(crate) fn advance(&mut self) {
        self.next = self.here().map_or(self.source.tokens.len(), |index| index + 1);
    }

    /// The index of the next token that is not white space; `None` at the end.
    pub(crate) fn here(&self) -> Option<usize> {
        let rest = self.source.tokens.get(self.next..).unwrap_or_default();
        rest.iter().position(|t| !matches!(t.token, Token::Whitespace(_))).map(|ahead| self.next + ahead)
    }

    fn significant(&self) -> impl Iterator<Item = &'t Token> + use<'t> {
        let rest = self.source.tokens.get(self.next..).unwrap_or_default();
        rest.iter().map(|t| &t.token).filter(|t| !matches!(t, Token::Whitespace(_)))
    }
}

fn bare(token: &Token) -> Option<&Word> {
    match token {
        Token::Word(word) if word.quote_style.is_none() => Some(word),
        _ => None,
    }
}

/// Whether a token is this word, without quotes.
pub(crate) fn is_word(token: &Token, wanted: &str) -> bool {
    bare(token).is_some_and(|word| word.value.eq_ignore_ascii_case(wanted))
}
