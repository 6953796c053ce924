//! Credentials that end, change, or stand for others.

use super::server::{Reply, Request, Server};
use super::*;
use crate::sync::{AtomicUsize, Mutex};

fn bearer_challenge(request: &Request) -> Reply {
    let host = request.header("host").unwrap_or_default();
    let challenge = format!(r#"Bearer realm="http://{host}/token",service="here""#);
    Reply::new(401, Vec::new()).with("www-authenticate", &challenge)
}

fn token_requests(server: &Server) -> usize {
    let requests = server.requests();
    let is_token = |request: &&Request| request.path.starts_with("/token");
    requests.iter().filter(is_token).count()
}

/// Wants a password that a test can change.
fn password_server(password: &Arc<Mutex<String>>) -> Server {
    use base64::Engine as _;
    let password = Arc::clone(password);
    Server::new(move |request, _| {
        let pair = format!("u:{}", lock(&password));
        let wanted = base64::engine::general_purpose::STANDARD.encode(pair);
        match request.header("authorization") {
            Some(header) if header == format!("Basic {wanted}") => Reply::range(request, &data()),
            _ => Reply::new(401, Vec::new()).with("www-authenticate", "Basic realm=\"x\""),
        }
    })
}

#[test]
fn a_token_in_use_is_renewed_before_anybody_waits_for_it() {
    let server = Server::new(|request, number| {
        if request.path.starts_with("/token") {
            let body = format!(r#"{{"token":"t{number}","expires_in":4}}"#);
            return Reply::ok(body.into_bytes());
        }
        match request.header("authorization") {
            Some(_) => Reply::range(request, &data()),
            None => bearer_challenge(request),
        }
    });
    let backend = backend(&server);
    expect(&backend, 0..10);
    assert_eq!(token_requests(&server), 1);
    // Good for 2 s, renewed after 1.5 s without any request; then nobody uses it.
    std::thread::sleep(Duration::from_millis(1800));
    assert_eq!(token_requests(&server), 2);
    std::thread::sleep(Duration::from_millis(1700));
    assert_eq!(
        token_requests(&server),
        2,
        "an idle backend asks for nothing"
    );
}

#[test]
fn identity_tokens_are_exchanged_and_may_change() {
    let server = Server::new(|request, number| {
        if request.path.starts_with("/token") {
            let answer = format!(
                r#"{{"access_token":"t{number}","expires_in":300,"refresh_token":"next"}}"#
            );
            return match request.method.as_str() {
                "POST" => Reply::ok(answer.into_bytes()),
                _ => Reply::new(401, Vec::new()),
            };
        }
        match request.header("authorization") {
            Some(header) if header.starts_with("Bearer t") => Reply::range(request, &data()),
            _ => bearer_challenge(request),
        }
    });
    let mut config = config(&server);
    config.auth = Credentials::Identity("s3cret".into());
    assert!(!format!("{config:?}").contains("s3cret"));
    expect(&RegistryBackend::new(config).unwrap(), 0..10);
    assert_eq!(token_requests(&server), 1);
}

#[test]
fn credentials_are_replaced_while_reading() {
    let password = Arc::new(Mutex::new("one".to_owned()));
    let server = password_server(&password);
    let mut config = config(&server);
    config.auth = basic("one");
    let backend = RegistryBackend::new(config).unwrap();
    expect(&backend, 0..10);
    "two".clone_into(&mut lock(&password));
    let error = fetch(&backend, 0..10).unwrap_err();
    assert!(matches!(error, BackendError::Auth { .. }), "{error}");
    backend.set_credentials(basic("two")).unwrap();
    expect(&backend, 0..10);
    let bad = Credentials::Bearer("no\ntoken".into());
    let error = backend.set_credentials(bad).unwrap_err();
    assert!(!format!("{error:?}").contains("token\n"), "{error:?}");
    expect(&backend, 0..10);

    // Sixteen readers, and a registry whose password changes under them.
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                for _ in 0..20 {
                    while fetch(&backend, 0..1000).is_err() {}
                }
            });
        }
        for number in 0..10 {
            let next = format!("p{number}");
            next.clone_into(&mut lock(&password));
            backend.set_credentials(basic(&next)).unwrap();
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    expect(&backend, 0..10);
}

struct Helper {
    answers: Arc<Mutex<String>>,
    asked: AtomicUsize,
}

impl CredentialProvider for Helper {
    fn credentials(&self) -> Result<Credentials, String> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        Ok(basic(&lock(&self.answers)))
    }
}

#[test]
fn a_helper_is_asked_when_credentials_are_refused() {
    let password = Arc::new(Mutex::new("new".to_owned()));
    let server = password_server(&password);
    let helper = Arc::new(Helper {
        answers: Arc::clone(&password),
        asked: AtomicUsize::new(0),
    });
    for auth in [Credentials::Anonymous, basic("old")] {
        let mut config = config(&server);
        config.auth = auth;
        config.provider = Some(Arc::clone(&helper) as Arc<dyn CredentialProvider>);
        let backend = RegistryBackend::new(config).unwrap();
        let before = helper.asked.load(Ordering::Relaxed);
        expect(&backend, 0..10);
        expect(&backend, 0..10);
        assert_eq!(helper.asked.load(Ordering::Relaxed), before + 1);
    }
    // What it says is no better than what was refused: it is not asked all the time.
    let mut config = config(&server);
    config.auth = basic("old");
    config.provider = Some(Arc::new(Helper {
        answers: Arc::new(Mutex::new("old".to_owned())),
        asked: AtomicUsize::new(0),
    }));
    let backend = RegistryBackend::new(config).unwrap();
    for _ in 0..3 {
        let error = fetch(&backend, 0..10).unwrap_err();
        assert!(matches!(error, BackendError::Auth { .. }), "{error}");
    }
}
