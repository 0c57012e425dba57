//! Passwords, certificates, and doors that must not stand open.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use crate::support::demo::directory;
use crate::support::fleet::{Node, Server};
use crate::support::{backhaul, both, run, until};

const SCRAM: &str = "local all all scram-sha-256\nlocal replication all scram-sha-256\n";

/// A primary that asks everybody for a password; `root` has one.
fn guarded_primary(dir: &Path) -> Server {
    let settings = vec![("password_encryption".to_owned(), "scram-sha-256".to_owned())];
    let mut server = Server::primary(dir, "server", &settings);
    server.ask("ALTER ROLE root PASSWORD 'of root'");
    server.set_hba(SCRAM);
    server
}

fn conninfo(server: &Server, password: &str) -> String {
    format!("{} password='{password}'", server.instance.conninfo("backhaul"))
}

fn init(node: &Node, secret: &Path) -> Command {
    let mut init = backhaul();
    init.args(["init", "--user", "root", "--host", &node.address, "--secret-file"]).arg(secret);
    init.env("PGPASSWORD", "of root");
    init
}

#[test]
fn a_fleet_with_passwords_is_set_up_as_the_documentation_says() {
    let dir = directory();
    let server = guarded_primary(dir.path());
    let secret = dir.path().join("secret");
    let secret_file = secret.to_str().unwrap();
    let postgres = conninfo(&server, "of backhaul");
    let first = Node::start(dir.path(), "n1", &["--secret-file", secret_file, "--postgres", &postgres]);
    // Before init: clients of PostgreSQL that ask for this server pass, the node itself cannot log in yet.
    let said = run(&mut init(&first, &secret));
    for words in ["is initialized", "was written to", "pg_hba.conf", "scram-sha-256", "no synchronous standby"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let again = both(&init(&first, &secret).output().unwrap());
    assert!(again.contains("cluster has already been initialized"), "{again}");

    let set = "ALTER ROLE backhaul PASSWORD 'of backhaul'; CREATE ROLE app LOGIN PASSWORD 'of app'";
    let mut psql = first.psql("root:of%20root", "postgres");
    run(psql.env("PGOPTIONS", "-c backhaul.target=local").args(["-c", set]));
    let second = Node::start(dir.path(), "n2", &["--secret-file", secret_file, "--join", &first.address]);
    for node in [&first, &second] {
        until("the fleet to have a leaseholder", || {
            let output = node.psql("app:of%20app", "postgres").args(["-Atc", "SELECT current_user"]).output().unwrap();
            if both(&output).trim() == "app" { Ok(()) } else { Err(both(&output)) }
        });
        let wrong = both(&node.psql("app:wrong", "postgres").args(["-c", "SELECT 1"]).output().unwrap());
        assert!(wrong.contains("password authentication failed for user \"app\""), "{wrong}");
        let nobody = both(&node.psql("nobody:x", "postgres").args(["-c", "SELECT 1"]).output().unwrap());
        assert!(nobody.contains("password authentication failed for user \"nobody\""), "{nobody}");
    }
    until("both to be members", || {
        let mut status = backhaul();
        let output = status.args(["node", "status", "--host", &second.address, "--secret-file", secret_file]).output();
        let said = both(&output.unwrap());
        if said.matches(" true ").count() == 4 { Ok(()) } else { Err(said) }
    });

    // A node with another secret is no peer: it is told so, and so are its clients.
    let other = dir.path().join("other");
    cluster::secret::ClusterSecret::create(&other).unwrap();
    let flags = ["--secret-file", other.to_str().unwrap(), "--join", &first.address];
    let stranger = Node::start(dir.path(), "stranger", &flags);
    stranger.until_logged("the cluster secret does not match");
    let refused = both(&stranger.psql("app:of%20app", "postgres").args(["-c", "SELECT 1"]).output().unwrap());
    assert!(refused.contains("the cluster secret does not match"), "{refused}");
    let mut status = backhaul();
    status.args(["node", "status", "--host", &first.address, "--insecure"]);
    let refused = both(&status.output().unwrap());
    assert!(refused.contains("the node asks for the cluster secret; give --secret-file"), "{refused}");
    let mut open = init(&first, &secret);
    let refused = both(&open.env_remove("PGPASSWORD").output().unwrap());
    assert!(refused.contains("give it by PGPASSWORD"), "{refused}");
    std::fs::set_permissions(&other, std::fs::Permissions::from_mode(0o644)).unwrap();
    let Err(log) = Node::try_start(dir.path(), "careless", &flags) else { panic!("a secret that all may read") };
    assert!(log.contains("chmod 600"), "{log}");
    // The secret goes to nobody who does not ask for it as a node should.
    let trusting = Node::start(dir.path(), "trusting", &["--insecure"]);
    let mut status = backhaul();
    let refused = both(
        &status.args(["node", "status", "--host", &trusting.address, "--secret-file", secret_file]).output().unwrap(),
    );
    assert!(refused.contains("does not ask for the cluster secret as it should"), "{refused}");
    for log in [first.log(), second.log(), stranger.log()] {
        let secrets = [std::fs::read_to_string(&secret).unwrap(), std::fs::read_to_string(&other).unwrap()];
        assert!(secrets.iter().all(|secret| !log.contains(secret.trim())) && !log.contains("of backhaul"), "{log}");
    }
}

#[test]
fn clients_may_speak_tls_and_nodes_must_when_they_can() {
    let dir = directory();
    let certs = dir.path().join("certs");
    std::fs::create_dir(&certs).unwrap();
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
    for (name, text) in
        [("node.crt", made.cert.pem()), ("node.key", made.signing_key.serialize_pem()), ("ca.crt", made.cert.pem())]
    {
        std::fs::write(certs.join(name), text).unwrap();
    }
    let mut server = Server::primary(dir.path(), "server", &Vec::new());
    server.ask("CREATE ROLE app LOGIN PASSWORD 'of app'");
    server.ask("CREATE ROLE backhaul LOGIN; GRANT pg_monitor TO backhaul");
    server.set_hba("local all app scram-sha-256\nlocal all all trust\n");
    let certs_dir = certs.to_str().unwrap();
    let postgres = server.instance.conninfo("backhaul");
    let first = Node::start(dir.path(), "n1", &["--insecure", "--certs-dir", certs_dir, "--postgres", &postgres]);
    let second = Node::start(dir.path(), "n2", &["--insecure", "--certs-dir", certs_dir, "--join", &first.address]);
    // The tools verify the node, too, and need nothing but the authority's certificate for that.
    let authority = dir.path().join("authority");
    std::fs::create_dir(&authority).unwrap();
    let status = |certs: &Path| {
        let mut status = backhaul();
        status.args(["node", "status", "--insecure", "--host", &second.address, "--certs-dir"]).arg(certs);
        both(&status.output().unwrap())
    };
    assert!(status(&authority).contains("ca.crt: No such file"), "never plain text by mistake");
    std::fs::copy(certs.join("ca.crt"), authority.join("ca.crt")).unwrap();
    assert!(status(&authority).contains("NOTICE: the registry cannot be reached"));
    let other = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    std::fs::write(authority.join("ca.crt"), other.cert.pem()).unwrap();
    assert!(status(&authority).contains("invalid peer certificate"));
    for node in [&first, &second] {
        let ask = |ssl: &str, binding: &str| {
            let url =
                format!("postgresql://app:of%20app@{}/postgres?sslmode={ssl}&channel_binding={binding}", node.address);
            let mut psql = crate::support::demo::psql(&url);
            psql.env("PGSSLROOTCERT", certs.join("ca.crt")).args(["-At", "-c", "\\conninfo", "-c", "SHOW LOCALITY"]);
            both(&psql.args(["-c", "SELECT current_user"]).output().unwrap())
        };
        until("the fleet to have a leaseholder", || match ask("verify-full", "prefer") {
            said if said.contains("SSL connection (protocol: TLSv1.3") && said.ends_with("app\n") => Ok(()),
            said => Err(said),
        });
        assert!(ask("disable", "prefer").ends_with("app\n"));
        // The last hop has no TLS, so the server offers no channel binding, and the client says so.
        let refused = ask("require", "require");
        assert!(refused.contains("channel binding is required, but server did not offer"), "{refused}");
    }
}

#[test]
fn a_node_does_not_stand_before_an_open_door() {
    let dir = directory();
    let mut server = Server::primary(dir.path(), "server", &Vec::new());
    server.ask("CREATE ROLE backhaul LOGIN; ALTER ROLE root PASSWORD 'of root'");
    let secret = dir.path().join("secret");
    cluster::secret::ClusterSecret::create(&secret).unwrap();
    let postgres = server.instance.conninfo("backhaul");
    for (case, hba, found) in [
        ("trust", "local all all trust\n", "lets in role \"backhaul\" without a password"),
        (
            "trust for others",
            "local all backhaul scram-sha-256\nlocal all all trust\n",
            "lets in role \"postgres\" without a password",
        ),
        (
            "replication",
            "local all all scram-sha-256\nlocal replication all trust\n",
            "for replication without a password",
        ),
    ] {
        server.set_hba(hba);
        let node = Node::start(dir.path(), "n1", &["--secret-file", secret.to_str().unwrap(), "--postgres", &postgres]);
        let (code, log) = node.until_ended();
        assert!(code == Some(1) && log.contains(found) && log.contains("scram-sha-256"), "{case}: {log}");
    }
    // A rule for one database that nobody knocks at is found by reading, where the service role may.
    server.set_hba("local secrets mallory trust\nlocal all all scram-sha-256\n");
    let superuser = format!("{} password='of root'", server.instance.conninfo("root"));
    let node = Node::start(dir.path(), "n1", &["--secret-file", secret.to_str().unwrap(), "--postgres", &superuser]);
    let (code, log) = node.until_ended();
    assert!(code == Some(1) && log.contains("line 1 of pg_hba.conf"), "{log}");
}
