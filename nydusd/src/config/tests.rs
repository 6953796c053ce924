//! Configurations that clients send, and what is wrong with those that are refused.

use storage::backend::http_proxy::Address;
use storage::backend::object::{Keys, Login, Store};
use storage::backend::registry::{Scheduling, Tasks, Upstream, WhoFallsBack, WholeBlob};

use super::*;

const V2: &str = r#"
version = 2
id = "one"
[backend]
type = "registry"
[backend.registry]
host = "registry.example:5000"
repo = "library/nginx"
scheme = "http"
auth = "dXNlcjpwYXNz"
timeout = 7
retry_limit = 3
[cache]
type = "filecache"
[cache.filecache]
work_dir = "/cache"
[rafs]
mode = "direct"
"#;

/// What a containerd client writes, stray keys included.
const V1: &str = r#"{
  "device": {
    "id": "/12",
    "backend": {
      "type": "registry",
      "config": {"readahead": false, "host": "r.example", "repo": "a/b", "auth": "",
                 "scheme": "https", "timeout": 5, "connect_timeout": 5, "retry_limit": 0,
                 "mirrors": [{"host": "http://m", "headers": {"X-Up": "https://r.example"},
                              "ping_url": "http://m/ping", "health_check_interval": 7, "failure_limit": 3}], "proxy": {"url": "", "fallback": true}}
    },
    "external_backends": null,
    "cache": {"type": "blobcache", "compressed": true, "config": {"work_dir": "/c",
              "disable_indexed_map": false}}
  },
  "mode": "direct", "digest_validate": false, "iostats_files": false, "enable_xattr": true,
  "amplify_io": 1048576, "warmup": 0, "id": "stray",
  "fs_prefetch": {"enable": true, "threads_count": 4, "merging_size": 524288,
                  "bandwidth_rate": 0, "prefetch_all": true}
}"#;

const LOCAL: &str = r#"{"version":2,
  "backend":{"type":"localfs","localfs":{"dir":"/blobs","alt_dirs":["/more"],"readahead":true}},
  "cache":{"type":"blobcache","filecache":{"work_dir":"/c"},"prefetch":{"enable":false}},
  "rafs":{"mode":"direct","enable_xattr":true}}"#;

#[test]
fn version_2_toml() {
    let config = Config::parse(V2).unwrap();
    assert_eq!(config.id, "one");
    assert_eq!(config.cache.dir, Path::new("/cache"));
    assert_eq!(config.warnings, Vec::<String>::new());
    let Backend::Registry(registry) = config.backend else {
        panic!("not a registry")
    };
    assert_eq!(registry.host, "registry.example:5000");
    assert!(registry.plain_http);
    assert_eq!(registry.timeout, Some(Duration::from_secs(7)));
    assert_eq!(registry.connect_timeout, None);
    assert_eq!(registry.retry_limit, Some(3));
    let basic = super::Login::Basic {
        user: "user".into(),
        password: "pass".into(),
    };
    assert_eq!(registry.login, basic);
    assert!(!format!("{:?}", registry.login).contains("pass"));
}

#[test]
fn version_1_with_stray_keys() {
    let config = Config::parse(V1).unwrap();
    assert_eq!(config.id, "/12");
    assert_eq!(config.cache.dir, Path::new("/c"));
    let prefetch = Prefetch {
        threads: 4,
        batch_size: 524_288,
        bandwidth: 0,
        all: true,
    };
    assert_eq!(config.prefetch, Some(prefetch));
    let Backend::Registry(registry) = &config.backend else {
        panic!("not a registry")
    };
    let mut mirror = Mirror::new("http://m");
    mirror.headers = vec![("X-Up".into(), "https://r.example".into())];
    mirror.ping_url = Some("http://m/ping".into());
    mirror.health_check_interval = Duration::from_secs(7);
    mirror.failure_limit = 3;
    assert_eq!(registry.mirrors, [mirror]);
    let mut warned: Vec<&str> = config
        .warnings
        .iter()
        .map(|text| text.split(':').next().unwrap())
        .collect();
    warned.sort_unstable();
    assert_eq!(warned, ["device.backend.config.readahead", "id", "warmup"]);
}

#[test]
fn local_directories_in_order() {
    let config = Config::parse(LOCAL).unwrap();
    assert_eq!(
        config.backend,
        Backend::LocalFs(vec!["/blobs".into(), "/more".into()])
    );
    assert_eq!(config.prefetch, None);
}

/// Back end settings in version 2, of a cache that does not matter.
fn backend_of(kind: &str, settings: &str) -> Result<Backend, ConfigError> {
    let text = format!(
        "version = 2\n[backend]\ntype = '{kind}'\n[backend.{kind}]\n{settings}\n\
         [cache]\ntype = 'filecache'\n[rafs]\nmode = 'direct'\n"
    );
    Config::parse(&text).map(|config| config.backend)
}

#[test]
fn one_file_or_a_server_with_blobs() {
    assert_eq!(
        backend_of("localfs", "blob_file = '/x'").unwrap(),
        Backend::BlobFile("/x".into())
    );
    for (addr, wanted) in [
        ("/run/s.sock", Address::Socket("/run/s.sock".into())),
        ("http://h:1/", Address::Url("http://h:1/blobs".into())),
    ] {
        let settings = format!("addr = '{addr}'\npath = '/blobs'\ntimeout = 7");
        let Backend::HttpProxy(config) = backend_of("http-proxy", &settings).unwrap() else {
            panic!("not a server")
        };
        assert_eq!(config.address, wanted);
        assert_eq!(config.timeouts.read, Duration::from_secs(7));
    }
    let error = backend_of("http-proxy", "addr = 'h:1'").unwrap_err();
    assert!(error.to_string().contains("http://"), "{error}");
}

#[test]
fn buckets_of_every_store() {
    let keys = Login::Keys(Keys {
        id: "id".into(),
        secret: "word".into(),
    });
    let key_lines = "access_key_id = 'id'\naccess_key_secret = 'word'\nobject_prefix = 'p/'";
    let Backend::Object(s3) = backend_of(
        "s3",
        &format!("endpoint = 'h:1'\nregion = 'r'\nbucket_name = 'b'\nscheme = 'http'\n{key_lines}"),
    )
    .unwrap() else {
        panic!("not a bucket")
    };
    let mut wanted = ObjectConfig::new(Store::S3 { region: "r".into() }, "h:1", "b");
    wanted.scheme = Scheme::Http;
    wanted.prefix = "p/".into();
    wanted.login = keys.clone();
    assert_eq!(s3, wanted);
    assert!(!format!("{s3:?}").contains("word"));
    let rows = [
        ("oss", "endpoint = 'h'\nbucket_name = 'b'", Login::Anonymous),
        (
            "gcs",
            "bucket_name = 'b'\ncredentials = 'environment'",
            Login::Environment,
        ),
        (
            "gcs",
            "bucket_name = 'b'\ncredentials_file = '/f'",
            Login::KeyFile("/f".into()),
        ),
        (
            "azure",
            "account_name = 'id'\ncontainer_name = 'b'\naccount_key = 'word'",
            keys,
        ),
        (
            "azure",
            "account_name = 'id'\ncontainer_name = 'b'\nsas_token = 'sig=x'",
            Login::SharedAccess("sig=x".into()),
        ),
    ];
    for (kind, settings, login) in rows {
        let Backend::Object(config) = backend_of(kind, settings).unwrap() else {
            panic!("not a bucket")
        };
        assert_eq!(
            (config.login, config.bucket.as_str()),
            (login, "b"),
            "{kind}"
        );
    }
    let refused = [
        ("s3", "endpoint = 'h'\nbucket_name = 'b'", "region"),
        ("s3", "region = 'r'\nbucket_name = 'b'", "endpoint"),
        (
            "oss",
            "endpoint = 'https://h'\nbucket_name = 'b'",
            "endpoint",
        ),
        (
            "oss",
            "endpoint = 'h'\nbucket_name = 'b'\naccess_key_id = 'i'",
            "access_key_secret",
        ),
        ("azure", "container_name = 'b'", "account_name"),
        ("gcs", "bucket_name = 'b'\ncredentials = 'x'", "credentials"),
    ];
    for (kind, settings, key) in refused {
        let error = backend_of(kind, settings).unwrap_err().to_string();
        assert!(error.contains(&format!("backend.{kind}.{key}`")), "{error}");
    }
}

#[test]
fn credentials_are_decoded_and_not_repeated() {
    let login = super::Login::from_auth("bWU6c2VjcmV0Og==").unwrap();
    assert_eq!(
        login,
        super::Login::Basic {
            user: "me".into(),
            password: "secret:".into()
        }
    );
    let err = super::Login::from_auth("s3cr3t!").unwrap_err().to_string();
    assert!(
        err.contains("IMAGE_PULL_AUTH") && !err.contains("s3cr3t"),
        "{err}"
    );
}

/// Each row: a valid text, what to replace in it, and what the message must contain.
#[test]
fn what_is_refused_and_why() {
    let rows: &[(&str, &str, &str, &[&str])] = &[
        (
            LOCAL,
            r#""version":2"#,
            r#""version":3"#,
            &["`version` is 3", "allowed is 2"],
        ),
        (
            LOCAL,
            r#""type":"localfs""#,
            r#""type":7"#,
            &["`backend.type` is 7", "a string"],
        ),
        (
            LOCAL,
            r#""type":"localfs""#,
            r#""type":"ftp""#,
            &["`backend.type`", "ftp", "registry"],
        ),
        (
            LOCAL,
            r#""type":"localfs""#,
            r#""type":"localdisk""#,
            &["`backend.localdisk` is missing"],
        ),
        (
            LOCAL,
            r#""type":"localfs""#,
            r#""type":"s3""#,
            &["`backend.s3` is missing"],
        ),
        (
            V1,
            r#""host": "http://m""#,
            r#""host": "m""#,
            &[
                "`device.backend.config.mirrors[0].host` is \"m\"",
                "http://",
            ],
        ),
        (
            V1,
            r#""https://r.example"}"#,
            r#"7}"#,
            &["mirrors[0].headers", "a table of strings"],
        ),
        (
            V2,
            "retry_limit = 3",
            "client_key_file = '/k'",
            &["`backend.registry.client_cert_file` is missing"],
        ),
        (
            LOCAL,
            r#""type":"localfs""#,
            r#""type":"registry""#,
            &["`backend.registry` is missing"],
        ),
        (
            LOCAL,
            r#""dir":"/blobs""#,
            r#""dir":"""#,
            &["`backend.localfs.dir` is missing"],
        ),
        (
            LOCAL,
            r#"["/more"]"#,
            r#"["/more",1]"#,
            &["`backend.localfs.alt_dirs`", "strings"],
        ),
        (
            LOCAL,
            r#""blobcache""#,
            r#""""#,
            &["`cache.type`", "RAFS v6"],
        ),
        (
            LOCAL,
            r#""blobcache""#,
            r#""fscache""#,
            &["`cache.type`", "fscache", "filecache"],
        ),
        (
            LOCAL,
            r#"{"enable":false}"#,
            r#"{"enable":true,"threads":0}"#,
            &["`cache.prefetch.threads` is 0", "1 to 1024"],
        ),
        (
            LOCAL,
            r#"{"enable":false}"#,
            r#"{"enable":"no"}"#,
            &["cache.prefetch.enable", "true"],
        ),
        (
            LOCAL,
            r#"{"enable":false}"#,
            r#"{}"#,
            &["`cache.prefetch.enable` is missing"],
        ),
        (
            LOCAL,
            r#""mode":"direct""#,
            r#""mode":"fast""#,
            &["`rafs.mode` is \"fast\"", "cached"],
        ),
        (LOCAL, r#""rafs":"#, r#""raft":"#, &["`rafs` is missing"]),
        (
            LOCAL,
            r#""enable_xattr":true"#,
            r#""batch_size":-1"#,
            &["rafs.batch_size", "-1"],
        ),
        (
            LOCAL,
            r#""rafs":"#,
            r#""cache":{},"rafs":"#,
            &["`cache` occurs twice"],
        ),
        (
            LOCAL,
            r#""rafs":"#,
            r#""external_backends":[{}],"rafs":"#,
            &["external blobs"],
        ),
        (
            V2,
            "host = \"registry",
            "host = \"http://registry",
            &["`backend.registry.host`"],
        ),
        (
            V2,
            "scheme = \"http\"",
            "scheme = \"ftp\"",
            &["`backend.registry.scheme`", "https"],
        ),
        (
            V2,
            "dXNlcjpwYXNz",
            "@@@",
            &["`backend.registry.auth` is (not shown)", "base64"],
        ),
        (
            V2,
            "timeout = 7",
            "timeout = 86401",
            &["`backend.registry.timeout`", "86400"],
        ),
        (
            V2,
            "retry_limit = 3",
            "retry_limit = 256",
            &["retry_limit` is 256", "0 to 255"],
        ),
        (V2, "version = 2", "", &["`version` is missing"]),
        (V2, "[cache]", "[[cache", &["as JSON or TOML", "line"]),
        (
            V2,
            "[rafs]",
            "[cache]\n[rafs]",
            &["as JSON or TOML", "duplicate"],
        ),
        (
            V1,
            r#""mode": "direct""#,
            r#""mood": "direct""#,
            &["`mode` is missing"],
        ),
        (
            V1,
            r#""compressed": true, "config""#,
            r#""confix""#,
            &["`device.cache.config`"],
        ),
        (
            V1,
            r#""url": "", "fallback": true"#,
            r#""url": "p:1""#,
            &["`device.backend.config.proxy.url`", "http://"],
        ),
        (
            V1,
            r#""mode": "direct""#,
            r#""mode": "direct", "p2p": {"mode": "torrent"}"#,
            &["`p2p.mode`", "torrent", "\"forward\""],
        ),
        (
            V1,
            r#""mode": "direct""#,
            r#""mode": "direct", "p2p": {"endpoint": [{"url": "127.0.0.1:4001"}]}"#,
            &["`p2p.endpoint[0].url`", "http://"],
        ),
        (
            V1,
            r#""mode": "direct""#,
            r#""mode": "direct", "p2p": {"dragonfly": {"priority_on_demand": 7}}"#,
            &["`p2p.dragonfly.priority_on_demand`", "from 0 to 6"],
        ),
        (V1, r#""mode": "direct","#, "", &["`mode` is missing"]),
        (V1, "\"mode\"", "mode", &["as JSON", "line"]),
    ];
    for (base, from, to, wanted) in rows {
        assert!(base.contains(from), "row {from} changes nothing");
        let text = base.replacen(from, to, 1);
        let message = Config::parse(&text).expect_err(to).to_string();
        for part in *wanted {
            assert!(message.contains(part), "{to}: {message}");
        }
    }
}

/// The registry of a configuration that has one.
fn registry_of(text: &str) -> (Registry, Vec<String>) {
    let config = Config::parse(text).unwrap();
    let Backend::Registry(registry) = config.backend else {
        panic!("{:?}", config.backend)
    };
    (registry, config.warnings)
}

#[test]
fn a_forward_proxy_is_the_last_mirror() {
    let proxy = r#""url": "http://p:1", "ping_url": "http://p/ping", "check_interval": 7, "use_http": true"#;
    for (fallback, who) in [
        ("true", WhoFallsBack::Always),
        ("false", WhoFallsBack::Never),
    ] {
        let text = format!(r#"{proxy}, "fallback": {fallback}"#);
        let text = V1.replacen(r#""url": "", "fallback": true"#, &text, 1);
        let (registry, _) = registry_of(&text);
        assert_eq!(registry.mirrors.len(), 2);
        let mirror = &registry.mirrors[1];
        assert_eq!(mirror.url, "http://p:1");
        assert_eq!(mirror.upstream, Upstream::Proxy { plain: true });
        assert_eq!(mirror.ping_url.as_deref(), Some("http://p/ping"));
        assert_eq!(mirror.health_check_interval, Duration::from_secs(7));
        assert_eq!(mirror.dragonfly.as_ref().unwrap().priority_prefetch, 3);
        assert_eq!(registry.fallback.who, who);
    }
    // Other back ends fetch directly, or not at all.
    let text = "addr = 'http://h/'\nproxy = { url = 'http://p' }";
    backend_of("http-proxy", text).unwrap();
    let text = "addr = 'http://h/'\nproxy = { url = 'http://p', fallback = false }";
    let error = backend_of("http-proxy", text).unwrap_err();
    assert!(error.to_string().contains("no registry"), "{error}");
}

#[test]
fn endpoints_of_a_network_of_nodes_come_before_mirrors() {
    let p2p = r#""mode": "direct", "p2p": {
        "fallback": "never", "fallback_rate": 9, "dragonfly": {"tag": "t", "prefetch": "never"},
        "endpoint": [
            {"url": "http://127.0.0.1:4001", "ping_url": "http://127.0.0.1:4003/healthy"},
            {"url": "http://elsewhere", "registries": ["other.example"]},
            {"url": "http://seed:4001", "seed": true},
            {"url": "http://spegel:5000", "kind": "generic", "upstream": "ns", "registries": ["*"]}]}"#;
    let (registry, warnings) = registry_of(&V1.replacen(r#""mode": "direct""#, p2p, 1));
    let urls: Vec<_> = registry
        .mirrors
        .iter()
        .map(|mirror| mirror.url.as_str())
        .collect();
    let expected = [
        "http://127.0.0.1:4001",
        "http://seed:4001",
        "http://spegel:5000",
    ];
    assert_eq!(urls[..3], expected);
    assert_eq!(urls.len(), 4);
    let (agent, generic) = (&registry.mirrors[0], &registry.mirrors[2]);
    let seed = registry.mirrors[1].dragonfly.as_ref().unwrap();
    assert_eq!(
        (seed.scheduling, seed.tasks),
        (Scheduling::Auto, Tasks::Blobs)
    );
    let upstream = format!("https://{}", registry.host);
    assert_eq!(
        agent.headers,
        [("X-Dragonfly-Registry".to_owned(), upstream)]
    );
    let dragonfly = agent.dragonfly.as_ref().unwrap();
    assert_eq!(dragonfly.tasks, Tasks::default());
    assert_eq!(
        (dragonfly.tag.as_str(), dragonfly.whole_blob),
        ("t", WholeBlob::Never)
    );
    assert!(agent.share_credentials && !generic.share_credentials);
    assert_eq!(
        (&generic.dragonfly, generic.upstream),
        (&None, Upstream::Query)
    );
    assert_eq!(registry.fallback.who, WhoFallsBack::Never);
    assert_eq!((registry.fallback.rate, registry.fallback.burst), (9, 64));
    assert!(
        !warnings.iter().any(|text| text.contains("p2p")),
        "{warnings:?}"
    );

    let off = p2p.replacen("\"fallback\"", "\"mode\": \"off\", \"fallback\"", 1);
    let (registry, _) = registry_of(&V1.replacen(r#""mode": "direct""#, &off, 1));
    assert_eq!(registry.mirrors.len(), 1);
    assert_eq!(registry.fallback.who, WhoFallsBack::Always);
}

#[test]
fn a_mirror_with_headers_for_dragonfly_is_an_agent_of_it() {
    let text = V1.replacen("X-Up", "x-dragonfly-registry", 1);
    let (registry, _) = registry_of(&text);
    assert!(registry.mirrors[0].dragonfly.is_some(), "{registry:?}");
}

#[test]
fn a_stream_that_will_not_be_fetched_is_said() {
    let v2 = LOCAL.replacen(
        r#""prefetch":{"enable":false}"#,
        r#""prefetch":{"enable":true,"stream_prefetch":true}"#,
        1,
    );
    let v1 = V1.replacen(
        r#""prefetch_all": true"#,
        r#""prefetch_all": true, "stream_prefetch": true"#,
        1,
    );
    for text in [v1, v2] {
        let config = Config::parse(&text).unwrap();
        let warned = |text: &String| text.contains("stream_prefetch: no effect");
        assert!(config.warnings.iter().any(warned), "{:?}", config.warnings);
    }
}

#[test]
fn an_endless_file_is_refused() {
    // Never ends, so it has to be cut off.
    assert!(Config::load(Path::new("/dev/zero")).is_err());
    let long = format!("{V2}# {}", "x".repeat(1 << 20));
    assert!(matches!(Config::parse(&long), Err(ConfigError::TooLarge)));
}

proptest::proptest! {
    /// Whatever a file holds, the answer is a configuration or one message.
    #[test]
    fn no_text_breaks_the_parser(
        base in proptest::sample::select(vec![V1, V2, LOCAL]),
        at in proptest::prelude::any::<proptest::sample::Index>(),
        len in 0usize..20,
        with in ".{0,12}",
    ) {
        let starts: Vec<usize> = base.char_indices().map(|(index, _)| index).collect();
        let start = starts[at.index(starts.len())];
        let end = base.len().min(start + len);
        let text = format!("{}{with}{}", &base[..start], base.get(end..).unwrap_or(""));
        if let Err(err) = Config::parse(&text) {
            let message = err.to_string();
            proptest::prop_assert!(message.contains("configuration"), "{}", message);
            // Damage can move the secret under a key whose value may be shown.
            if text.contains(r#""auth":"dXNlcjpwYXNz""#) || text.contains("\nauth = \"dXNlcjpwYXNz\"") {
                proptest::prop_assert!(!message.contains("dXNlcjpwYXNz"), "{}", message);
            }
        }
    }
}

#[test]
fn limits_of_the_cache() {
    let usual = Config::parse(LOCAL).unwrap().cache;
    assert_eq!(usual, Cache::in_dir(Path::new("/c")));
    assert_eq!((usual.max_bytes, usual.min_free_percent), (None, 5));
    let with = |keys: &str| LOCAL.replace(r#""work_dir":"/c""#, keys);
    let keys =
        r#""work_dir":"/c","max_bytes":5000000000,"min_free_percent":0,"memory_bytes":33554432"#;
    let set = Config::parse(&with(keys)).unwrap();
    assert_eq!(set.warnings, Vec::<String>::new());
    let expected = Cache {
        dir: "/c".into(),
        max_bytes: Some(5_000_000_000),
        min_free_percent: 0,
        memory: 32 << 20,
    };
    assert_eq!(set.cache, expected);
    for wrong in [
        r#""min_free_percent":100"#,
        r#""memory_bytes":4096"#,
        r#""max_bytes":-1"#,
    ] {
        let error = Config::parse(&with(wrong)).unwrap_err().to_string();
        assert!(error.contains("cache.filecache."), "{error}");
    }
}

#[test]
fn limits_of_the_server() {
    assert_eq!(Config::parse(V2).unwrap().limits, None);
    assert_eq!(Config::parse(V1).unwrap().limits, None);
    let keys = "timeout = 7\nmax_requests = 16\nbandwidth_limit = 1000000";
    let set = Config::parse(&V2.replace("timeout = 7", keys)).unwrap();
    assert_eq!(set.warnings, Vec::<String>::new());
    let expected = gate::Limits {
        requests: 16,
        bandwidth: 1_000_000,
        ..gate::Limits::default()
    };
    assert_eq!(set.limits, Some(expected));
    let wrong = V2.replace("timeout = 7", "max_background_requests = -1");
    let error = Config::parse(&wrong).unwrap_err().to_string();
    assert!(error.contains("backend.registry.max_background"), "{error}");
}

#[test]
fn a_disk_with_blobs() {
    let with = |settings: &str| {
        let local =
            r#""type":"localfs","localfs":{"dir":"/blobs","alt_dirs":["/more"],"readahead":true}"#;
        LOCAL.replace(
            local,
            &format!(r#""type":"localdisk","localdisk":{{{settings}}}"#),
        )
    };
    let read = |settings: &str| Config::parse(&with(settings)).map(|config| config.backend);
    let expected = |with_table| Backend::LocalDisk {
        path: "/dev/sdx".into(),
        with_table,
    };
    let path = r#""device_path":"/dev/sdx""#;
    assert_eq!(read(path).unwrap(), expected(true));
    let whole = format!(r#"{path},"disable_gpt":true"#);
    assert_eq!(read(&whole).unwrap(), expected(false));
    let error = read("").unwrap_err().to_string();
    assert!(error.contains("backend.localdisk.device_path"), "{error}");
}
