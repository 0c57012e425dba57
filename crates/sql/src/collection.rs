//! Where backups are: in a collection, and one of them in a subdirectory of it.

use pgerror::PgError;

use crate::cursor::Cursor;
use crate::statement::{Subdir, Text};

/// The URI of a collection. Several are a backup that is spread over stores by locality, which is refused: `what` is
/// that, `hint` what to do.
pub(crate) fn collection(cursor: &mut Cursor<'_>, what: &str, hint: &str) -> Result<Text, PgError> {
    let begun = cursor.here();
    let mut uris = cursor.texts()?;
    if uris.len() > 1 {
        let refusal = cursor.unsupported_at(begun, format!("{what} several URIs is not supported yet"));
        cursor.refuse(refusal.hint(hint));
    }
    Ok(uris.swap_remove(0))
}

/// `{LATEST | subdir} IN uri`. `removed` is what to say of the form without `IN`, which CockroachDB once had.
pub(crate) fn backup(cursor: &mut Cursor<'_>, what: &str, removed: &str) -> Result<(Subdir, Text), PgError> {
    let from = Subdir::new(cursor.text()?);
    if !cursor.eat_word("IN") {
        return Err(cursor.wrong_here(removed));
    }
    Ok((from, collection(cursor, what, "Name the one URI that the backup was made with.")?))
}
