//! Expressions of PostgreSQL where a statement is refused whatever they say: they are read over, not understood, and only
//! so far that what is no expression, or stands behind one, is a syntax error where it stands.
//!
//! Nothing here recurses: what is in parentheses is read on with a count of them.

use pgerror::PgError;
use sqlparser::tokenizer::Token;

use crate::cursor::{Cursor, is_word};
use crate::selection::QUERIES;
use crate::syntax::literal;

/// Reads over an expression: operands with signs before them, casts behind them, and operators between. Returns whether it
/// is just `FALSE`.
pub(crate) fn expression(cursor: &mut Cursor<'_>) -> Result<bool, PgError> {
    let (begun, no) = (cursor.here(), cursor.at_word("FALSE"));
    let mut open = 0_usize;
    loop {
        if is_sign(cursor.peek()) || cursor.at_word("NOT") {
            cursor.advance();
            continue;
        }
        let is_query = || QUERIES.iter().any(|word| is_word(cursor.second(), word));
        if cursor.at(&Token::LParen) && !is_query() {
            cursor.advance();
            open += 1;
            continue;
        }
        operand(cursor)?;
        loop {
            if cursor.eat(&Token::DoubleColon) {
                type_name(cursor)?;
            } else if cursor.at(&Token::LBracket) {
                group(cursor)?;
            } else if open > 0 && cursor.eat(&Token::RParen) {
                open -= 1;
            } else {
                break;
            }
        }
        if !operator(cursor) && (open == 0 || !cursor.eat(&Token::Comma)) {
            break;
        }
    }
    if open > 0 {
        return Err(cursor.unexpected());
    }
    Ok(no && cursor.is_just_behind(begun))
}

/// A value, a name or a call, `CASE` up to its `END`, or a query in parentheses.
fn operand(cursor: &mut Cursor<'_>) -> Result<(), PgError> {
    if cursor.at(&Token::LParen) || cursor.at_word("CASE") {
        return group(cursor);
    }
    if literal(cursor.peek()).is_some() || cursor.at_word("NULL") {
        cursor.advance();
        return Ok(());
    }
    if cursor.eat_number() || cursor.placeholder().is_some() {
        return Ok(());
    }
    if !cursor.at_expression() {
        return Err(cursor.unexpected());
    }
    cursor.advance();
    while cursor.eat(&Token::Period) {
        cursor.name()?;
    }
    if cursor.at(&Token::LParen) {
        return group(cursor);
    }
    time_zone(cursor);
    // INTERVAL '1h'
    if literal(cursor.peek()).is_some() {
        cursor.advance();
    }
    Ok(())
}

/// The name of a type, with what belongs to it.
fn type_name(cursor: &mut Cursor<'_>) -> Result<(), PgError> {
    cursor.name()?;
    while cursor.eat(&Token::Period) {
        cursor.name()?;
    }
    let _ = cursor.eat_word("PRECISION") || cursor.eat_word("VARYING");
    if cursor.at(&Token::LParen) {
        group(cursor)?;
    }
    time_zone(cursor);
    Ok(())
}

fn time_zone(cursor: &mut Cursor<'_>) {
    let _ = cursor.eat_words(&["WITH", "TIME", "ZONE"]) || cursor.eat_words(&["WITHOUT", "TIME", "ZONE"]);
}

/// What two operands may have between them.
fn operator(cursor: &mut Cursor<'_>) -> bool {
    use Token::{Ampersand, Caret, Div, Eq, Gt, GtEq, Lt, LtEq, Mod, Mul, Neq, Pipe, StringConcat};
    let is_symbol = matches!(
        cursor.peek(),
        Ampersand | Caret | Div | Eq | Gt | GtEq | Lt | LtEq | Mod | Mul | Neq | Pipe | StringConcat
    );
    if is_symbol || is_sign(cursor.peek()) {
        cursor.advance();
        return true;
    }
    ["AND", "OR", "IS", "LIKE"].iter().any(|word| cursor.eat_word(word)) || cursor.eat_words(&["AT", "TIME", "ZONE"])
}

fn is_sign(token: &Token) -> bool {
    matches!(token, Token::Plus | Token::Minus)
}

/// Parentheses or brackets with what is in them, or `CASE` with what comes up to its `END`.
fn group(cursor: &mut Cursor<'_>) -> Result<(), PgError> {
    let mut depth = 0_usize;
    loop {
        match cursor.peek() {
            Token::EOF | Token::SemiColon => return Err(cursor.unexpected()),
            Token::LParen | Token::LBracket => depth += 1,
            Token::RParen | Token::RBracket => depth -= 1,
            _ if cursor.at_word("CASE") => depth += 1,
            _ if cursor.at_word("END") => depth -= 1,
            _ => {}
        }
        cursor.advance();
        if depth == 0 {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::parse;

    fn position_of(expression: &str, code: &str) -> Option<usize> {
        let text = format!("SHOW BACKUPS IN a OLDER THAN {expression} WITH index");
        let error = parse(&text).expect_err(expression);
        assert_eq!(error.code.as_str(), code, "{expression}");
        error.position
    }

    #[test]
    fn an_expression_is_read_to_its_end() {
        for expression in [
            "'-1h'",
            "$$-1h$$",
            "-1.5",
            "$1::s.timestamp(3) with time zone",
            "now()",
            "pg_catalog.to_timestamp(0, ')')",
            "date_trunc('day', now()) AT TIME ZONE 'UTC' - INTERVAL '1h'",
            "TIMESTAMP WITH TIME ZONE '2026-01-01'",
            "CAST('1' AS timestamp)",
            "CASE WHEN a THEN CASE b WHEN 1 THEN 2 END END + 1",
            "((SELECT 1) + 1)",
            "- - (('1'))::text || NULL",
            "ARRAY[1, (2)][1]",
            "(1, 2) = (a.b, \"C\") AND NOT false",
        ] {
            assert_eq!(position_of(expression, "0A000"), Some(19), "{expression}");
        }
        let deep = format!("{}1{}", "(".repeat(50_000), ")".repeat(50_000));
        assert_eq!(position_of(&deep, "0A000"), Some(19), "parentheses in each other");
    }

    #[test]
    fn what_is_no_expression_is_wrong_where_it_stands() {
        for (expression, offset) in [
            ("", 1),
            ("-", 2),
            ("1 2", 2),
            ("'a' b", 4),
            ("a b", 2),
            ("$0", 0),
            ("(1", 3),
            ("1)", 1),
            ("()", 1),
            ("(1 2)", 3),
            ("(1, )", 4),
            ("1 +", 4),
            ("a.", 3),
            ("'a'::", 6),
            ("'a'::1", 5),
            ("SELECT 1", 0),
            ("1, 2", 1),
        ] {
            let position = "SHOW BACKUPS IN a OLDER THAN ".len() + offset + 1;
            assert_eq!(position_of(expression, "42601"), Some(position), "{expression}");
        }
    }
}
