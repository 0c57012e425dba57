//! What a database holds at a point, read from its catalogs.
//!
//! Everything is read by a founder, so from the snapshot that the rows will be read from, except for what PostgreSQL
//! does not version: sizes of files, and sequences. A table that the backup could not read to the end is an error here
//! already, and one whose rows this server does not have is named as skipped.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use anyhow::Context as _;
use pgerror::{PgError, SqlState};
use tokio_postgres::Row;

use super::session::{Session, has_code, quoted};
use super::types::{DatabasePlan, Identity, MaterializedViewPlan, SequencePlan, Skipped, TablePlan};

/// Sequences read by one statement.
const SEQUENCES_AT_ONCE: usize = 100;

/// A table's [`Identity`] as JSON, of the row `c` of `pg_class`.
pub(super) const IDENTITY: &str = "json_build_object(
    'oid', c.oid::bigint, 'relkind', c.relkind, 'relam', c.relam::bigint, 'relfilenode', c.relfilenode::bigint,
    'toast_relfilenode', (SELECT t.relfilenode::bigint FROM pg_catalog.pg_class t WHERE t.oid = c.reltoastrelid),
    'columns', (SELECT coalesce(json_agg(json_build_object('number', attnum, 'name', attname,
                                                           'type_oid', atttypid::bigint, 'dropped', attisdropped,
                                                           'generated', attgenerated) ORDER BY attnum), '[]')
                FROM pg_catalog.pg_attribute WHERE attrelid = c.oid AND attnum > 0))::text";

/// A table's [`TablePlan::types`], of the row `c` of `pg_class`. COPY prints enums and composites by what these catalogs
/// hold at the moment, and altering a type takes no lock on the tables that use it. With `xmin`, what was altered and
/// altered back shows as well.
pub(super) const TYPES: &str = "CASE WHEN EXISTS (
    SELECT FROM pg_catalog.pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped AND atttypid >= 16384
) THEN (
    WITH RECURSIVE inside (type) AS (
        SELECT atttypid FROM pg_catalog.pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped
        UNION
        SELECT within.type FROM inside JOIN pg_catalog.pg_type t ON t.oid = inside.type CROSS JOIN LATERAL (
            SELECT t.typelem UNION ALL SELECT t.typbasetype
            UNION ALL SELECT rngsubtype FROM pg_catalog.pg_range WHERE t.oid IN (rngtypid, rngmultitypid)
            UNION ALL SELECT atttypid FROM pg_catalog.pg_attribute
                      WHERE attrelid = t.typrelid AND attnum > 0 AND NOT attisdropped) within (type)),
    own AS (SELECT t.* FROM pg_catalog.pg_type t JOIN inside ON t.oid = inside.type WHERE t.oid >= 16384),
    facts (fact, alterable) AS (
        SELECT pg_catalog.concat_ws(' ', 'type', oid, typtype, typbasetype, typelem, typrelid, typoutput::oid),
               typtype IN ('c', 'e')
        FROM own
        UNION ALL
        SELECT pg_catalog.concat_ws(' ', 'label', e.enumtypid, e.oid, e.xmin, e.enumsortorder, e.enumlabel), true
        FROM own JOIN pg_catalog.pg_enum e ON e.enumtypid = own.oid
        UNION ALL
        SELECT pg_catalog.concat_ws(' ', 'attribute', attrelid, attnum, a.xmin, atttypid, attisdropped, attname), true
        FROM own JOIN pg_catalog.pg_attribute a ON a.attrelid = own.typrelid AND attnum > 0)
    SELECT pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(
        pg_catalog.string_agg(fact, E'\\n' ORDER BY fact COLLATE \"C\"), pg_catalog.getdatabaseencoding())), 'hex')
    FROM facts HAVING pg_catalog.bool_or(alterable)
) END";

const DATABASE: &str = "
    SELECT d.datname::text, d.oid, pg_catalog.pg_encoding_to_char(d.encoding)::text, d.datcollate::text,
           d.datctype::text, coalesce(to_jsonb(d) ->> 'datlocprovider', 'c'),
           coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale'),
           pg_catalog.pg_get_userbyid(d.datdba)::text, d.datacl::text,
           coalesce((SELECT setconfig FROM pg_catalog.pg_db_role_setting
                     WHERE setdatabase = d.oid AND setrole = 0), '{}'),
           pg_catalog.shobj_description(d.oid, 'pg_database'),
           (SELECT count(*) FROM pg_catalog.pg_largeobject_metadata),
           coalesce((SELECT json_agg(json_build_array(r.rolname, setting) ORDER BY r.rolname, number)
                     FROM pg_catalog.pg_db_role_setting s JOIN pg_catalog.pg_roles r ON r.oid = s.setrole,
                          LATERAL unnest(s.setconfig) WITH ORDINALITY AS settings (setting, number)
                     WHERE s.setdatabase = d.oid), '[]')::text,
           to_jsonb(d) ->> 'daticurules',
           (SELECT spcname::text FROM pg_catalog.pg_tablespace
            WHERE pg_tablespace.oid = d.dattablespace AND spcname <> 'pg_default'),
           d.datconnlimit, d.datistemplate, d.datallowconn
    FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()";

/// Which relations are the user's own: not of the system, not temporary, not an extension's unless it says that their
/// rows are the user's (`pg_extension_config_dump`).
const OWN: &str = "
    FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid
                                    AND d.objsubid = 0 AND d.deptype = 'e'
    LEFT JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid
    WHERE c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
      AND (d.objid IS NULL OR coalesce(c.oid = ANY (e.extconfig), false))";

const TABLE_COLUMNS: &str = "
    c.oid, n.nspname::text, c.relname::text, c.relkind::text, c.relpersistence::text,
    coalesce(pg_catalog.pg_relation_size(c.oid), 0), pg_catalog.current_setting('block_size')::bigint,
    coalesce(pg_catalog.pg_relation_size(nullif(c.reltoastrelid, 0)), 0), greatest(c.reltuples, 0)::bigint,
    coalesce((SELECT amname = 'heap' FROM pg_catalog.pg_am WHERE oid = c.relam), false),
    (e.extcondition)[pg_catalog.array_position(e.extconfig, c.oid)],
    coalesce(pg_catalog.has_table_privilege(c.oid, 'SELECT'), true),
    CASE WHEN c.relrowsecurity THEN pg_catalog.row_security_active(c.oid) ELSE false END";

const SEQUENCE_COLUMNS: &str = "
    n.nspname::text, c.relname::text, c.relpersistence::text,
    (SELECT seqincrement FROM pg_catalog.pg_sequence WHERE seqrelid = c.oid)";

/// What `pg_dump` leaves out, or writes without its options, when the role may not read it; only superusers may.
const UNREADABLE: &str = "
    SELECT 'subscription', pg_catalog.quote_ident(subname),
           'only a superuser may read it, and the role of the node is none'
    FROM pg_catalog.pg_subscription
    WHERE subdbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
      AND NOT (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user)
    UNION ALL
    SELECT 'user mapping', pg_catalog.format('for %I on server %I', usename, srvname),
           'its options, if it has any, may not be read by the role of the node; it is kept without them'
    FROM pg_catalog.pg_user_mappings
    WHERE umoptions IS NULL AND NOT (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user)
    ORDER BY 1, 2";

const EXTENSIONS: &str = "SELECT extname::text, extversion FROM pg_catalog.pg_extension ORDER BY 1";

/// The bootstrap superuser is in no dependency, because it cannot be dropped; so owners are looked up as well.
const ROLES: &str = "
    WITH mine AS (SELECT oid, datdba FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()),
    named (role) AS (
        SELECT s.refobjid FROM pg_catalog.pg_shdepend s, mine
        WHERE s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass
          AND (s.dbid = mine.oid OR s.dbid = 0 AND s.objid = mine.oid
                                    AND s.classid = 'pg_catalog.pg_database'::pg_catalog.regclass)
        UNION SELECT datdba FROM mine
        UNION SELECT relowner FROM pg_catalog.pg_class WHERE oid >= 16384 AND relpersistence <> 't'
        UNION SELECT nspowner FROM pg_catalog.pg_namespace WHERE oid >= 16384 AND nspname !~ '^pg_'
        UNION SELECT proowner FROM pg_catalog.pg_proc WHERE oid >= 16384
        UNION SELECT typowner FROM pg_catalog.pg_type WHERE oid >= 16384)
    SELECT rolname::text FROM named JOIN pg_catalog.pg_roles ON oid = role WHERE rolname !~ '^pg_' ORDER BY 1";

const TABLESPACES: &str = "
    SELECT spcname::text FROM pg_catalog.pg_tablespace
    WHERE spcname NOT IN ('pg_default', 'pg_global')
      AND oid IN (SELECT reltablespace FROM pg_catalog.pg_class WHERE relpersistence <> 't'
                  UNION SELECT dattablespace FROM pg_catalog.pg_database
                        WHERE datname = pg_catalog.current_database())
    ORDER BY 1";

/// The files that large objects are read from: of their two catalogs, and of the indexes by which they are found.
pub(super) const LARGE_OBJECT_FILES: &str = "
    SELECT pg_catalog.string_agg(pg_catalog.concat_ws(' ', c.oid, c.relfilenode), ', ' ORDER BY c.oid)
    FROM pg_catalog.pg_class c,
         (VALUES ('pg_catalog.pg_largeobject'::pg_catalog.regclass), ('pg_catalog.pg_largeobject_metadata')) large (oid)
    WHERE c.oid = large.oid OR c.oid IN (SELECT indexrelid FROM pg_catalog.pg_index WHERE indrelid = large.oid)";

/// Reads the plan of the session's database. What the schema dump adds is left empty.
pub(super) async fn plan(founder: &Session, in_recovery: bool) -> anyhow::Result<DatabasePlan> {
    let mut plan = database(&founder.row(DATABASE, &[]).await?)?;
    if plan.large_objects > 0 {
        plan.large_object_files = founder.row(LARGE_OBJECT_FILES, &[]).await?.get(0);
    }
    let order = "ORDER BY pg_catalog.pg_relation_size(c.oid) DESC NULLS LAST, c.oid";
    let query = format!("SELECT {TABLE_COLUMNS}, {IDENTITY}, {TYPES} {OWN} AND c.relkind IN ('r', 'f') {order}");
    for row in founder.rows(&query, &[]).await? {
        match table(&row, in_recovery)? {
            Ok(table) => plan.tables.push(table),
            Err(skipped) => plan.skipped.push(skipped),
        }
    }
    plan.tables.sort_by_key(|table| std::cmp::Reverse(table.bytes));
    let (sequences, skipped) = sequences(founder, in_recovery).await?;
    plan.sequences = sequences;
    plan.skipped.extend(skipped);
    let unreadable = |row: &Row| Skipped { kind: row.get(0), object: row.get(1), reason: row.get(2) };
    plan.skipped.extend(founder.rows(UNREADABLE, &[]).await?.iter().map(unreadable));
    let views =
        format!("SELECT n.nspname::text, c.relname::text, c.relispopulated {OWN} AND c.relkind = 'm' ORDER BY 1, 2");
    let view = |row: &Row| MaterializedViewPlan { schema: row.get(0), name: row.get(1), populated: row.get(2) };
    plan.materialized_views = founder.rows(&views, &[]).await?.iter().map(view).collect();
    plan.extensions = founder.rows(EXTENSIONS, &[]).await?.iter().map(|row| (row.get(0), row.get(1))).collect();
    plan.roles = founder.rows(ROLES, &[]).await?.iter().map(|row| row.get(0)).collect();
    plan.tablespaces = founder.rows(TABLESPACES, &[]).await?.iter().map(|row| row.get(0)).collect();
    Ok(plan)
}

/// The first large object that the role may not read by what the catalogs say.
const DOUBTFUL: &str = "
    SELECT oid FROM pg_catalog.pg_largeobject_metadata
    WHERE NOT pg_catalog.current_setting('lo_compat_privileges')::bool AND NOT pg_catalog.pg_has_role(lomowner, 'USAGE')
      AND NOT EXISTS (SELECT FROM pg_catalog.aclexplode(lomacl) a WHERE a.privilege_type = 'SELECT'
                      AND (a.grantee = 0 OR pg_catalog.pg_has_role(a.grantee, 'USAGE')))
    LIMIT 1";

/// Asked with a point, and before the first piece: so the refusal comes as an answer and not in the middle of the rows. Only
/// one object is opened for it, for there may be millions.
///
/// # Errors
///
/// 42501 when the role may not read one of them.
pub(super) async fn may_read_large_objects(founder: &Session, database: &str) -> anyhow::Result<()> {
    let doubtful = founder.rows(DOUBTFUL, &[]).await.context("ask for the right to read large objects")?;
    let Some(doubtful) = doubtful.first() else { return Ok(()) };
    // A newer release may have another way to give the right.
    let query = "SELECT length(pg_catalog.lo_get($1, 0, 0))";
    founder.rows(query, &[&doubtful.get::<_, u32>(0)]).await.map(drop).map_err(|error| {
        if !has_code(&error, &[SqlState::INSUFFICIENT_PRIVILEGE]) {
            return error.context("ask for the right to read large objects");
        }
        let message = format!("the role of the node may not read the large objects of database {}", quoted(database));
        PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, message)
            .hint("Let a superuser set lo_compat_privileges = on for the role.")
            .into()
    })
}

/// Encodings in which PostgreSQL cannot say which characters the bytes are: it converts them to no other one, or, of
/// `SQL_ASCII`, refuses on the way out what happens not to be UTF-8.
const OPAQUE: [&str; 2] = ["SQL_ASCII", "MULE_INTERNAL"];

fn database(row: &Row) -> anyhow::Result<DatabasePlan> {
    let encoding: String = row.get(2);
    let is_opaque = OPAQUE.contains(&encoding.as_str());
    Ok(DatabasePlan {
        name: row.get(0),
        oid: row.get(1),
        copy_encoding: if is_opaque { encoding.clone() } else { "UTF8".to_owned() },
        encoding,
        collate: row.get(3),
        ctype: row.get(4),
        locale_provider: row.get(5),
        locale: row.get(6),
        locale_rules: row.get(13),
        tablespace: row.get(14),
        connection_limit: row.get(15),
        is_template: row.get(16),
        allows_connections: row.get(17),
        owner: row.get(7),
        acl: row.get(8),
        settings: row.get(9),
        role_settings: serde_json::from_str(row.get(12))?,
        comment: row.get(10),
        large_objects: row.get(11),
        large_object_files: None,
        extensions: Vec::new(),
        tables: Vec::new(),
        sequences: Vec::new(),
        materialized_views: Vec::new(),
        roles: Vec::new(),
        tablespaces: Vec::new(),
        skipped: Vec::new(),
        warnings: Vec::new(),
        schema_bytes: 0,
        dump_version: String::new(),
    })
}

/// One table, or why it is skipped.
fn table(row: &Row, in_recovery: bool) -> anyhow::Result<Result<TablePlan, Skipped>> {
    let (schema, name): (String, String) = (row.get(1), row.get(2));
    let skipped = |kind: &str, reason: &str| {
        let object = format!("{}.{}", shown(&schema), shown(&name));
        Ok(Err(Skipped { object, kind: kind.to_owned(), reason: reason.to_owned() }))
    };
    if row.get::<_, &str>(3) == "f" {
        return skipped("foreign table", "its rows are on another server");
    }
    if in_recovery && row.get::<_, &str>(4) == "u" {
        return skipped("table", "it is unlogged, and a standby does not have its rows");
    }
    if !row.get::<_, bool>(11) {
        let message = format!("the role of the node may not read table \"{schema}.{name}\"");
        return Err(PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, message)
            .hint("Grant it pg_read_all_data, or SELECT on the table.")
            .into());
    }
    if row.get::<_, bool>(12) {
        let message =
            format!("row-level security keeps the role of the node from reading all of table \"{schema}.{name}\"");
        let hint = "Give the role BYPASSRLS.";
        return Err(PgError::new(SqlState::INSUFFICIENT_PRIVILEGE, message).hint(hint).into());
    }
    let identity: Identity = serde_json::from_str(row.get(13))?;
    let is_read = |column: &&super::types::ColumnIdentity| !column.dropped && column.generated.is_empty();
    let columns = identity.columns.iter().filter(is_read).map(|column| column.name.clone()).collect();
    let heap = row.get::<_, i64>(5).unsigned_abs();
    Ok(Ok(TablePlan {
        oid: row.get(0),
        schema,
        name,
        columns,
        blocks: heap.div_ceil(row.get::<_, i64>(6).unsigned_abs()),
        bytes: heap + row.get::<_, i64>(7).unsigned_abs(),
        estimated_rows: row.get::<_, i64>(8).unsigned_abs(),
        ranges_possible: row.get(9),
        where_clause: row.get::<_, Option<&str>>(10).and_then(condition),
        identity,
        types: row.get(14),
    }))
}

/// What follows the WHERE of an extension's condition.
fn condition(clause: &str) -> Option<String> {
    let clause = clause.trim();
    let head = clause.get(..5).filter(|head| head.eq_ignore_ascii_case("where"));
    let condition = head.map_or(clause, |head| &clause[head.len()..]).trim();
    (!condition.is_empty()).then(|| condition.to_owned())
}

/// A sequence whose value is not read yet: schema, name, increment.
type Listed = (String, String, i64);

/// Sequences do not know snapshots: they are read as they are now, which is never behind the rows of the snapshot.
pub(super) async fn sequences(
    session: &Session,
    in_recovery: bool,
) -> anyhow::Result<(Vec<SequencePlan>, Vec<Skipped>)> {
    let (listed, skipped) = listed(session, in_recovery).await?;
    let mut sequences = Vec::new();
    for some in listed.chunks(SEQUENCES_AT_ONCE) {
        sequences.extend(values(session, some).await?);
    }
    Ok((sequences, skipped))
}

/// Those of `planned`, by schema and name, as they are now; without those that are gone by the time they are read.
pub(super) async fn sequences_left(
    session: &Session,
    in_recovery: bool,
    planned: &BTreeSet<(String, String)>,
) -> anyhow::Result<Vec<SequencePlan>> {
    let (mut listed, _) = listed(session, in_recovery).await?;
    listed.retain(|(schema, name, _)| planned.contains(&(schema.clone(), name.clone())));
    let mut sequences = Vec::new();
    for some in listed.chunks(SEQUENCES_AT_ONCE) {
        match values(session, some).await {
            Ok(values) => sequences.extend(values),
            // One of them, and which is not said.
            Err(error) if is_gone(&error) => {
                for one in some.chunks(1) {
                    match values(session, one).await {
                        Ok(value) => sequences.extend(value),
                        Err(error) if is_gone(&error) => {}
                        Err(error) => return Err(error),
                    }
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(sequences)
}

/// Whether no sequence has the name any more: nothing has, or a table that lacks a sequence's columns.
fn is_gone(error: &anyhow::Error) -> bool {
    has_code(error, &[SqlState::UNDEFINED_TABLE, SqlState::UNDEFINED_COLUMN])
}

async fn listed(session: &Session, in_recovery: bool) -> anyhow::Result<(Vec<Listed>, Vec<Skipped>)> {
    let mut skipped = Vec::new();
    let query = format!("SELECT {SEQUENCE_COLUMNS} {OWN} AND c.relkind = 'S' ORDER BY 1, 2");
    let mut listed = Vec::new();
    for row in session.rows(&query, &[]).await? {
        let (schema, name): (String, String) = (row.get(0), row.get(1));
        if in_recovery && row.get::<_, &str>(2) == "u" {
            skipped.push(Skipped {
                object: format!("{}.{}", shown(&schema), shown(&name)),
                kind: "sequence".to_owned(),
                reason: "it is unlogged, and a standby does not have its value".to_owned(),
            });
            continue;
        }
        // NULL only when the sequence was dropped meanwhile; reading it then says so.
        listed.push((schema, name, row.get::<_, Option<i64>>(3).unwrap_or(1)));
    }
    Ok((listed, skipped))
}

async fn values(session: &Session, some: &[Listed]) -> anyhow::Result<Vec<SequencePlan>> {
    let mut query = String::new();
    for (number, (schema, name, _)) in some.iter().enumerate() {
        let union = if number == 0 { "" } else { " UNION ALL " };
        write!(query, "{union}SELECT {number}, last_value, is_called FROM {}.{}", quoted(schema), quoted(name))?;
    }
    query.push_str(" ORDER BY 1");
    let rows = session.rows(&query, &[]).await?;
    let value = |(row, (schema, name, increment)): (&Row, &Listed)| SequencePlan {
        schema: schema.clone(),
        name: name.clone(),
        last_value: row.get(1),
        is_called: row.get(2),
        increment: *increment,
    };
    Ok(rows.iter().zip(some).map(value).collect())
}

/// A name as a reader expects it: quoted only where SQL needs that.
fn shown(name: &str) -> String {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let is_plain = name.chars().all(plain) && !name.starts_with(|c: char| c.is_ascii_digit());
    if is_plain { name.to_owned() } else { quoted(name) }
}

/// Catalogs from which `pg_dump` makes a schema, by their key; a row that is written anew has another `xmin`.
/// Whatever belongs to temporary objects is left out, or every query that needs a temporary table would count.
const VERSIONED: &[(&str, &str, &str)] = &[
    ("pg_attribute", "attrelid, attnum", "attrelid NOT IN (TABLE temporary)"),
    ("pg_attrdef", "oid", "adrelid NOT IN (TABLE temporary)"),
    ("pg_constraint", "oid", "conrelid NOT IN (TABLE temporary)"),
    ("pg_index", "indexrelid", "indrelid NOT IN (TABLE temporary)"),
    ("pg_inherits", "inhrelid, inhseqno", "inhrelid NOT IN (TABLE temporary)"),
    ("pg_rewrite", "oid", "ev_class NOT IN (TABLE temporary)"),
    ("pg_trigger", "oid", "tgrelid NOT IN (TABLE temporary)"),
    ("pg_sequence", "seqrelid", "seqrelid NOT IN (TABLE temporary)"),
    ("pg_type", "oid", "typnamespace NOT IN (TABLE passing)"),
    ("pg_proc", "oid", "pronamespace NOT IN (TABLE passing)"),
    ("pg_namespace", "oid", "oid NOT IN (TABLE passing)"),
    ("pg_aggregate", "aggfnoid::pg_catalog.oid", "true"),
    ("pg_am", "oid", "true"),
    ("pg_amop", "oid", "true"),
    ("pg_amproc", "oid", "true"),
    ("pg_cast", "oid", "true"),
    ("pg_collation", "oid", "true"),
    ("pg_conversion", "oid", "true"),
    ("pg_default_acl", "oid", "true"),
    ("pg_description", "objoid, classoid, objsubid", "true"),
    ("pg_enum", "oid", "true"),
    ("pg_event_trigger", "oid", "true"),
    ("pg_extension", "oid", "true"),
    ("pg_foreign_data_wrapper", "oid", "true"),
    ("pg_foreign_server", "oid", "true"),
    ("pg_foreign_table", "ftrelid", "true"),
    ("pg_init_privs", "objoid, classoid, objsubid", "true"),
    ("pg_language", "oid", "true"),
    ("pg_opclass", "oid", "true"),
    ("pg_operator", "oid", "true"),
    ("pg_opfamily", "oid", "true"),
    ("pg_partitioned_table", "partrelid", "true"),
    ("pg_policy", "oid", "true"),
    ("pg_publication", "oid", "true"),
    ("pg_publication_rel", "oid", "true"),
    ("pg_range", "rngtypid", "true"),
    ("pg_seclabel", "objoid, classoid, objsubid", "true"),
    ("pg_statistic_ext", "oid", "true"),
    ("pg_transform", "oid", "true"),
    ("pg_ts_config", "oid", "true"),
    ("pg_ts_config_map", "mapcfg, maptokentype, mapseqno", "true"),
    ("pg_ts_dict", "oid", "true"),
    ("pg_ts_parser", "oid", "true"),
    ("pg_ts_template", "oid", "true"),
];

/// The same of those that are there since release 15.
const VERSIONED_15: &[(&str, &str, &str)] = &[("pg_publication_namespace", "oid", "true")];

/// `pg_class` by what shows in a schema: its rows are also written anew by TRUNCATE, REINDEX and the like.
const CLASS: &str = "SELECT 'pg_class', count(*), sum(pg_catalog.hashtextextended(
        (c.oid, c.relname, c.relnamespace, c.reltype, c.reloftype, c.relowner, c.relam, c.relkind, c.relpersistence,
         c.reltablespace, c.relchecks, c.relrowsecurity, c.relforcerowsecurity, c.relreplident, c.relispartition,
         c.relacl, c.reloptions, c.relpartbound)::text, 0))
    FROM pg_catalog.pg_class c WHERE c.relpersistence <> 't'";

/// What changes whenever the schema of the session's database changes.
pub(super) async fn fingerprint(session: &Session) -> anyhow::Result<Vec<String>> {
    let mut query = format!(
        "WITH temporary AS (SELECT oid FROM pg_catalog.pg_class WHERE relpersistence = 't'),
              passing AS (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname ~ '^pg_(toast_)?temp_')
         SELECT pg_catalog.concat_ws(' ', name, rows, digest) FROM ({CLASS}"
    );
    let has_later = "SELECT pg_catalog.current_setting('server_version_num')::int >= 150000";
    let has_later = session.rows(has_later, &[]).await?.iter().any(|row| row.get(0));
    for (catalog, key, filter) in VERSIONED.iter().chain(VERSIONED_15.iter().filter(|_| has_later)) {
        write!(
            query,
            " UNION ALL SELECT '{catalog}', count(*), sum(pg_catalog.hashtextextended((xmin, {key})::text, 0))
              FROM pg_catalog.{catalog} WHERE {filter}"
        )?;
    }
    query.push_str(") AS parts (name, rows, digest) ORDER BY 1");
    Ok(session.rows(&query, &[]).await?.iter().map(|row| row.get(0)).collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::private::{Installation, Instance, RunAs, Settings};

    const THERE: &str = "
        CREATE ROLE one; CREATE ROLE two;
        CREATE TABLE t (a int PRIMARY KEY, b text); INSERT INTO t VALUES (1, 'x'); CREATE TABLE u (a int, b text);
        CREATE TABLE parts (a int) PARTITION BY RANGE (a); CREATE TABLE part (a int);
        CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'; CREATE VIEW v AS SELECT a FROM t;
        CREATE FUNCTION fire() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE FUNCTION fired() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
        CREATE TYPE e AS ENUM ('x'); CREATE TYPE c AS (a int); CREATE SEQUENCE s;
        CREATE FOREIGN DATA WRAPPER w0; CREATE SERVER s0 FOREIGN DATA WRAPPER w0; CREATE PUBLICATION p0";

    /// A change, and the catalog that tells of it.
    const SHOWN: &[(&str, &str)] = &[
        ("ALTER TABLE u ADD COLUMN c int", "pg_attribute"),
        ("ALTER TABLE u ALTER COLUMN b SET DEFAULT 'x'", "pg_attrdef"),
        ("ALTER TABLE t ADD CHECK (a > 0)", "pg_constraint"),
        ("CREATE INDEX ON u (a)", "pg_index"),
        ("ALTER TABLE parts ATTACH PARTITION part FOR VALUES FROM (1) TO (9)", "pg_inherits"),
        ("CREATE OR REPLACE VIEW v AS SELECT a + 0 AS a FROM t", "pg_rewrite"),
        ("CREATE RULE r AS ON INSERT TO u DO NOTHING", "pg_rewrite"),
        ("CREATE TRIGGER g AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION fire()", "pg_trigger"),
        ("ALTER TABLE t DISABLE TRIGGER g", "pg_trigger"),
        ("ALTER SEQUENCE s INCREMENT 5", "pg_sequence"),
        ("CREATE DOMAIN d AS int CHECK (VALUE > 0)", "pg_type"),
        ("CREATE OR REPLACE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 2'", "pg_proc"),
        ("GRANT USAGE ON SCHEMA public TO one", "pg_namespace"),
        ("CREATE AGGREGATE total (int) (SFUNC = int4pl, STYPE = int)", "pg_aggregate"),
        ("CREATE ACCESS METHOD another TYPE TABLE HANDLER heap_tableam_handler", "pg_am"),
        ("CREATE OPERATOR === (LEFTARG = int, RIGHTARG = int, FUNCTION = int4eq)", "pg_operator"),
        ("CREATE OPERATOR FAMILY o USING hash", "pg_opfamily"),
        ("CREATE OPERATOR CLASS o FOR TYPE c USING hash AS STORAGE c", "pg_opclass"),
        ("ALTER OPERATOR FAMILY o USING hash ADD OPERATOR 1 === (int, int)", "pg_amop"),
        ("ALTER OPERATOR FAMILY o USING hash ADD FUNCTION 1 (int, int) hashint4(int)", "pg_amproc"),
        ("CREATE CAST (e AS int) WITH INOUT", "pg_cast"),
        ("CREATE COLLATION l FROM \"C\"", "pg_collation"),
        ("CREATE CONVERSION n FOR 'LATIN1' TO 'UTF8' FROM iso8859_1_to_utf8", "pg_conversion"),
        ("ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO one", "pg_default_acl"),
        ("COMMENT ON COLUMN t.b IS 'x'", "pg_description"),
        ("ALTER TYPE e ADD VALUE 'y'", "pg_enum"),
        ("ALTER TYPE e RENAME VALUE 'x' TO 'z'", "pg_enum"),
        ("CREATE EVENT TRIGGER h ON ddl_command_end EXECUTE FUNCTION fired()", "pg_event_trigger"),
        ("DROP EVENT TRIGGER h", "pg_event_trigger"),
        ("CREATE FOREIGN DATA WRAPPER w", "pg_foreign_data_wrapper"),
        ("CREATE SERVER x FOREIGN DATA WRAPPER w", "pg_foreign_server"),
        ("CREATE FOREIGN TABLE y () SERVER s0 OPTIONS (a 'b')", "pg_foreign_table"),
        ("ALTER FOREIGN TABLE y OPTIONS (SET a 'c')", "pg_foreign_table"),
        ("CREATE TRUSTED LANGUAGE another HANDLER plpgsql_call_handler", "pg_language"),
        ("CREATE TABLE further (a int) PARTITION BY LIST (a)", "pg_partitioned_table"),
        ("CREATE POLICY few ON t USING (a > 1)", "pg_policy"),
        ("ALTER PUBLICATION p0 SET (publish = 'insert')", "pg_publication"),
        ("ALTER PUBLICATION p0 ADD TABLE u", "pg_publication_rel"),
        ("ALTER PUBLICATION p0 ADD TABLES IN SCHEMA public", "pg_publication_namespace"),
        ("CREATE TYPE range AS RANGE (SUBTYPE = int)", "pg_range"),
        ("CREATE STATISTICS ab ON a, b FROM u", "pg_statistic_ext"),
        (
            "CREATE TRANSFORM FOR int LANGUAGE sql (FROM SQL WITH FUNCTION prsd_lextype(internal),
                                                    TO SQL WITH FUNCTION int4recv(internal))",
            "pg_transform",
        ),
        ("CREATE TEXT SEARCH CONFIGURATION k (COPY = english)", "pg_ts_config"),
        ("ALTER TEXT SEARCH CONFIGURATION k DROP MAPPING FOR word", "pg_ts_config_map"),
        ("CREATE TEXT SEARCH DICTIONARY k (TEMPLATE = simple)", "pg_ts_dict"),
        (
            "CREATE TEXT SEARCH PARSER k (START = prsd_start, GETTOKEN = prsd_nexttoken, END = prsd_end,
                                          LEXTYPES = prsd_lextype)",
            "pg_ts_parser",
        ),
        ("CREATE TEXT SEARCH TEMPLATE k (LEXIZE = dsimple_lexize)", "pg_ts_template"),
        // By hand: a label needs a library that knows it, and rights as they were at first an extension.
        ("INSERT INTO pg_seclabel VALUES ('t'::regclass, 'pg_class'::regclass, 0, 'k', 'x')", "pg_seclabel"),
        ("DELETE FROM pg_init_privs WHERE ctid = (SELECT min(ctid) FROM pg_init_privs)", "pg_init_privs"),
        ("UPDATE pg_extension SET extversion = '7'", "pg_extension"),
        ("ALTER TABLE u RENAME TO u2", "pg_class"),
        ("ALTER TABLE u2 OWNER TO two", "pg_class"),
        ("GRANT SELECT ON u2 TO one", "pg_class"),
        ("ALTER TABLE t SET (fillfactor = 50)", "pg_class"),
        ("ALTER TABLE t ENABLE ROW LEVEL SECURITY", "pg_class"),
        ("ALTER TABLE t FORCE ROW LEVEL SECURITY", "pg_class"),
        ("ALTER TABLE t REPLICA IDENTITY FULL", "pg_class"),
        ("ALTER TABLE t SET UNLOGGED", "pg_class"),
        ("CREATE SCHEMA z; ALTER TABLE t SET SCHEMA z", "pg_class"),
        ("ALTER TABLE parts DETACH PARTITION part", "pg_class"),
        ("ALTER TABLE part OF c", "pg_class"),
    ];

    /// What writes rows of the catalogs anew, and shows in no schema.
    const UNSEEN: &[&str] = &[
        "INSERT INTO t SELECT n, 'x' FROM generate_series(2, 1000) n",
        "ANALYZE t",
        "VACUUM FULL t",
        "REINDEX TABLE t",
        "TRUNCATE t",
        "SELECT nextval('s')",
        "CREATE TEMP TABLE passing (id serial PRIMARY KEY, n int DEFAULT 1 CHECK (n > 0)); CREATE INDEX ON passing (n);
         CREATE TEMP VIEW passed AS SELECT * FROM passing; CREATE TEMP TABLE heir () INHERITS (passing);
         CREATE TRIGGER g AFTER INSERT ON passing FOR EACH ROW EXECUTE FUNCTION fire();
         CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "DROP TABLE passing CASCADE",
    ];

    /// The catalogs that tell of what is done by `statements`.
    async fn told(session: &Session, statements: &str) -> Vec<String> {
        let before = fingerprint(session).await.unwrap();
        session.run(statements).await.unwrap_or_else(|error| panic!("{statements}: {error:#}"));
        let after = fingerprint(session).await.unwrap();
        let differing = before.iter().zip(&after).filter(|(before, after)| before != after);
        differing.map(|(before, _)| before.split(' ').next().unwrap().to_owned()).collect()
    }

    #[tokio::test]
    async fn a_fingerprint_changes_with_all_that_shows_in_a_schema_and_with_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        std::fs::create_dir(dir.path().join("server")).unwrap();
        let (found, user) = (Installation::find().unwrap(), RunAs::choose().unwrap());
        let mut instance = Instance::new(found, user, &dir.path().join("server")).unwrap();
        let settings: Settings = vec![("autovacuum".to_owned(), "off".to_owned())];
        instance.init("root", &settings).unwrap();
        instance.start("root", &dir.path().join("log")).await.unwrap();
        let (server, end) = (instance.server("root").unwrap(), CancellationToken::new());
        let session = Session::open(&server, "postgres", 7, &end).await.unwrap();
        session.run(&format!("SET search_path = public; {THERE}")).await.unwrap();
        let mut wrong = Vec::new();
        for unseen in UNSEEN {
            let told = told(&session, unseen).await;
            wrong.extend((!told.is_empty()).then_some((unseen, told)));
        }
        for (shown, catalog) in SHOWN {
            let told = told(&session, shown).await;
            wrong.extend((!told.iter().any(|told| told == catalog)).then_some((shown, told)));
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
        // Each of them is in a case of its own.
        for (catalog, ..) in VERSIONED.iter().chain(VERSIONED_15) {
            assert!(SHOWN.iter().any(|(_, told)| told == catalog), "{catalog}");
        }
        let child = instance.child().unwrap();
        child.start_kill().unwrap();
        child.wait().await.unwrap();
    }

    #[test]
    fn a_condition_of_an_extension_loses_its_where() {
        for (clause, expected) in
            [("WHERE NOT standard", Some("NOT standard")), ("where(a)", Some("(a)")), ("", None), (" WHERE ", None)]
        {
            assert_eq!(condition(clause).as_deref(), expected, "{clause:?}");
        }
    }

    #[test]
    fn names_are_quoted_for_readers_where_sql_needs_it() {
        for (name, expected) in
            [("plain_1", "plain_1"), ("Mixed", "\"Mixed\""), ("1st", "\"1st\""), ("a\"b", "\"a\"\"b\"")]
        {
            assert_eq!(shown(name), expected);
        }
    }
}
