//! Files of mirrors, good and bad ones.

use storage::oci::ImageRef;

use super::*;

fn place(text: &str) -> RegistryRef {
    match text.parse().unwrap() {
        ImageRef::Registry(place) => place,
        ImageRef::Layout(_) => panic!("{text}"),
    }
}

/// A directory with these files: names of registries, and texts.
fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let at = directory.path().join(name);
        fs::create_dir_all(&at).unwrap();
        fs::write(at.join(FILE), text).unwrap();
    }
    directory
}

fn added(files: &[(&str, &str)], image: &str) -> Json {
    let directory = directory(files);
    let mirrors = Mirrors::open(directory.path()).unwrap();
    let place = place(image);
    let mut backend = json!({"host": place.host, "scheme": "https"});
    mirrors.add_to(&mut backend, &place);
    backend["mirrors"].clone()
}

const DFINIT: &str = r#"
    server = "https://registry.example"
    [host."http://127.0.0.1:4001"]
    capabilities = ["pull", "resolve"]
    [host."http://127.0.0.1:4001".header]
    X-Dragonfly-Registry = "https://registry.example"
"#;

#[test]
fn what_dfinit_writes_becomes_a_mirror() {
    assert_eq!(
        added(&[("registry.example", DFINIT)], "registry.example/app:1"),
        json!([{
            "host": "http://127.0.0.1:4001",
            "headers": {"X-Dragonfly-Registry": "https://registry.example"},
        }])
    );
}

#[test]
fn all_keys_in_the_order_of_the_file() {
    let text = r#"
        [host."https://z.example/v2"]
        override_path = true
        skip_verify = true
        ca = ["/etc/z.pem", "near.pem"]
        ping_url = "https://z.example/healthy"
        health_check_interval = 7
        failure_limit = 3
        header = {X-One = ["a", "b"], X-Two = "c"}
        [host."https://only-resolves.example"]
        capabilities = ["resolve"]
        [host."https://wants-a-certificate.example"]
        client = "/etc/client.pem"
        [host."https://a.example/sub"]
        [host."b.example"]
    "#;
    let directory = directory(&[("registry.example_5000_", text)]);
    let mirrors = Mirrors::open(directory.path()).unwrap();
    let mut backend = json!({"host": "registry.example:5000", "mirrors": [{"host": "http://own"}]});
    mirrors.add_to(&mut backend, &place("registry.example:5000/app:1"));
    let near = directory.path().join("registry.example_5000_/near.pem");
    let expected = json!([
        {
            "host": "https://z.example",
            "headers": {"X-One": "a, b", "X-Two": "c"},
            "ping_url": "https://z.example/healthy",
            "health_check_interval": 7,
            "failure_limit": 3,
            "skip_verify": true,
            "ca_cert_files": ["/etc/z.pem", near],
        },
        {"host": "https://a.example/sub", "headers": {}},
        {"host": "https://b.example", "headers": {}},
        {"host": "http://own"},
    ]);
    assert_eq!(backend["mirrors"], expected);
}

#[test]
fn the_first_directory_that_exists_counts() {
    let host = |name: &str| format!("[host.\"http://{name}\"]");
    let all = [
        ("r.example_5000_", host("port")),
        ("r.example:5000", host("colon")),
        ("_default", host("default")),
    ];
    for (skip, wanted) in [(0, "port"), (1, "colon"), (2, "default")] {
        let files: Vec<_> = all[skip..].iter().map(|(n, t)| (*n, t.as_str())).collect();
        let mirrors = added(&files, "r.example:5000/app:1");
        assert_eq!(mirrors[0]["host"], format!("http://{wanted}"));
    }
    let text = host("hub");
    let files = [("docker.io", text.as_str())];
    assert_eq!(added(&files, "nginx")[0]["host"], "http://hub");
    assert_eq!(added(&files, "r.example/app"), Json::Null);

    // Certificates only: containerd uses no mirror then, whatever the default is.
    let text = host("default");
    let directory = directory(&[("_default", text.as_str())]);
    fs::create_dir(directory.path().join("r.example")).unwrap();
    let mirrors = Mirrors::open(directory.path()).unwrap();
    assert_eq!(mirrors.of(&place("r.example/app")).unwrap(), []);
}

#[test]
fn a_mirror_of_all_registries_is_told_which() {
    let plain = "[host.\"http://127.0.0.1:4001\"]";
    let mirrors = added(&[("_default", plain)], "r.example:5000/app");
    let told = json!({"X-Dragonfly-Registry": "https://r.example:5000"});
    assert_eq!(mirrors[0]["headers"], told);
    // Who has a word for it is not contradicted, and a mirror of one registry knows.
    let named = "[host.\"http://m\".header]\nx-dragonfly-registry = \"https://other\"";
    let mirrors = added(&[("_default", named)], "r.example/app");
    let told = json!({"x-dragonfly-registry": "https://other"});
    assert_eq!(mirrors[0]["headers"], told);
    let mirrors = added(&[("r.example", plain)], "r.example/app");
    assert_eq!(mirrors[0]["headers"], json!({}));
}

#[test]
fn bad_files_are_refused_at_the_start_by_file_key_and_value() {
    for (text, words) in [
        ("[host", &["TOML"][..]),
        ("host = 1", &["`host`"]),
        ("[host]\nx = 1", &["host.\"x\""]),
        ("[host.\"ftp://m\"]", &["ftp://m", "http://"]),
        ("[host.\"http://\"]", &["address"]),
        ("[host.\"http://u:p@m\"]", &["address"]),
        ("[host.\"http://m/?x\"]", &["address"]),
        (
            "[host.\"http://m/path\"]\noverride_path = true",
            &["override_path", "/v2"],
        ),
        (
            "[host.\"http://m\"]\nskip_verify = \"yes\"",
            &["skip_verify", "yes", "true or false"],
        ),
        (
            "[host.\"http://m\"]\nfailure_limit = 256",
            &["failure_limit", "256", "0 to 255"],
        ),
        (
            "[host.\"http://m\"]\nhealth_check_interval = -1",
            &["health_check_interval", "-1"],
        ),
        (
            "[host.\"http://m\"]\nping_url = \"m/healthy\"",
            &["ping_url", "m/healthy"],
        ),
        ("[host.\"http://m\"]\nca = [1]", &["ca", "[1]"]),
        ("[host.\"http://m\"]\ncapabilities = 1", &["capabilities"]),
        ("[host.\"http://m\".header]\n\"a b\" = \"c\"", &["a b"]),
        ("[host.\"http://m\".header]\na = \"b\\nc\"", &["header"]),
        ("[host.\"http://m\".header]\na = 1", &["header.a"]),
    ] {
        let directory = directory(&[("r.example", text)]);
        let error = Mirrors::open(directory.path()).unwrap_err().to_string();
        let file = "r.example/hosts.toml";
        for word in words.iter().chain([&file]) {
            assert!(error.contains(word), "{text}: no {word} in {error}");
        }
    }
    let long = format!("# {}", "x".repeat(2 << 20));
    let directory = directory(&[("r.example", long.as_str())]);
    assert!(Mirrors::open(directory.path()).is_err());
}

#[test]
fn what_is_unknown_or_missing_is_no_error() {
    let text = "future = 1\n[host.\"http://m\"]\nnovel = true\ndial_timeout = \"5s\"";
    let mirrors = added(&[("r.example", text)], "r.example/app");
    assert_eq!(mirrors, json!([{"host": "http://m", "headers": {}}]));
    let nowhere = Mirrors::open(Path::new("/no/such/directory")).unwrap();
    assert_eq!(nowhere.of(&place("r.example/app")).unwrap(), []);
    let off = Mirrors::open(Path::new("")).unwrap();
    assert_eq!(off.of(&place("r.example/app")).unwrap(), []);
    let stray = tempfile::tempdir().unwrap();
    fs::write(stray.path().join("README"), "x").unwrap();
    assert!(Mirrors::open(stray.path()).is_ok());
}

#[test]
fn a_file_that_breaks_later_costs_its_mirrors_only() {
    let directory = directory(&[("r.example", DFINIT)]);
    let mirrors = Mirrors::open(directory.path()).unwrap();
    fs::write(directory.path().join("r.example/hosts.toml"), "[").unwrap();
    let mut backend = json!({"host": "r.example"});
    mirrors.add_to(&mut backend, &place("r.example/app"));
    assert_eq!(backend, json!({"host": "r.example"}));
}
