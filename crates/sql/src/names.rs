//! Names and literals in print, and the words that cannot be names without quotes.

use std::borrow::Cow;

/// PostgreSQL's reserved words, sorted. `SELECT` as a name needs quotes there, so it does here.
const RESERVED: [&str; 78] = [
    "all",
    "analyse",
    "analyze",
    "and",
    "any",
    "array",
    "as",
    "asc",
    "asymmetric",
    "both",
    "case",
    "cast",
    "check",
    "collate",
    "column",
    "constraint",
    "create",
    "current_catalog",
    "current_date",
    "current_role",
    "current_time",
    "current_timestamp",
    "current_user",
    "default",
    "deferrable",
    "desc",
    "distinct",
    "do",
    "else",
    "end",
    "except",
    "false",
    "fetch",
    "for",
    "foreign",
    "from",
    "grant",
    "group",
    "having",
    "in",
    "initially",
    "intersect",
    "into",
    "lateral",
    "leading",
    "limit",
    "localtime",
    "localtimestamp",
    "not",
    "null",
    "offset",
    "on",
    "only",
    "or",
    "order",
    "placing",
    "primary",
    "references",
    "returning",
    "select",
    "session_user",
    "some",
    "symmetric",
    "system_user",
    "table",
    "then",
    "to",
    "trailing",
    "true",
    "union",
    "unique",
    "user",
    "using",
    "variadic",
    "when",
    "where",
    "window",
    "with",
];

/// Whether a bare word, in any case, is reserved.
pub(crate) fn is_reserved(word: &str) -> bool {
    RESERVED.binary_search(&word.to_ascii_lowercase().as_str()).is_ok()
}

/// A name as SQL reads it back: bare where it can be, else in double quotes.
pub(crate) fn quoted_name(name: &str) -> Cow<'_, str> {
    let letter = |c: char| c.is_ascii_lowercase() || c == '_';
    let bare = name.starts_with(letter) && name.chars().all(|c| letter(c) || c.is_ascii_digit());
    match bare && !is_reserved(name) {
        true => Cow::Borrowed(name),
        false => Cow::Owned(format!("\"{}\"", name.replace('"', "\"\""))),
    }
}

/// A text as SQL reads it back, in single quotes.
pub(crate) fn quoted_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_quoted_only_where_it_must_be() {
        for (name, printed) in [
            ("shop", "shop"),
            ("_2", "_2"),
            ("2nd", "\"2nd\""),
            ("Shop", "\"Shop\""),
            ("B b", "\"B b\""),
            ("a\"b", "\"a\"\"b\""),
            ("select", "\"select\""),
            ("läden", "\"läden\""),
            ("", "\"\""),
        ] {
            assert_eq!(quoted_name(name), printed);
        }
        assert_eq!(quoted_literal("it's"), "'it''s'");
    }

    #[test]
    fn the_reserved_words_are_sorted() {
        assert!(RESERVED.is_sorted());
        assert!(is_reserved("INTO") && is_reserved("all") && is_reserved("with") && !is_reserved("latest"));
    }
}
