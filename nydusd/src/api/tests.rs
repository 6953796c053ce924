//! The API without a socket: calls in, answers out.

use super::*;

fn api() -> Api {
    Api {
        manager: Arc::default(),
        mounts: None,
        logs: crate::logging::for_tests(),
        id: Some("d1".to_owned()),
        supervisor: None,
        life: Life::alone(),
    }
}

fn call(api: &Api, method: &str, target: &str, body: &str) -> Result<Answer, (u16, String)> {
    request::parse(method, target)
        .and_then(|call| api.answer(&call, body.as_bytes()))
        .map_err(|err| (err.status, err.message))
}

#[test]
fn a_daemon_without_images_tells_so() {
    let api = api();
    let Ok(Answer::Json(info)) = call(&api, "GET", "/api/v1/daemon", "") else {
        panic!("no info");
    };
    assert_eq!(info["state"], "RUNNING");
    assert_eq!(info["id"], "d1");
    assert_eq!(info["backend_collection"], json!({}));
    let Ok(Answer::Json(info)) = call(&api, "GET", "/api/v2/daemon", "") else {
        panic!("no info");
    };
    assert_eq!(info["backend_collection"], Value::Null);
    assert_eq!(
        call(&api, "GET", "/api/v1/metrics/inflight", ""),
        Ok(Answer::Nothing)
    );
}

/// Status and words that clients match.
#[test]
fn refusals() {
    let api = api();
    let absent = "Mount(MountFilesystem(Other(\"object or filesystem doesn't exist\")))";
    for (method, target, body, status, words) in [
        ("DELETE", "/api/v1/mount?mountpoint=/1", "", 500, absent),
        (
            "POST",
            "/api/v1/mount?mountpoint=/1",
            "{",
            400,
            "ParseBody(Error(",
        ),
        (
            "POST",
            "/api/v1/mount?mountpoint=/1",
            "{}",
            400,
            "missing field `source`",
        ),
        (
            "POST",
            "/api/v1/mount?mountpoint=/1",
            r#"{"fs_type":"ext4","source":"a","config":""}"#,
            500,
            "InvalidFsType",
        ),
        (
            "PUT",
            "/api/v1/daemon/start",
            "",
            400,
            "UnexpectedEvent(\"Start\")",
        ),
        (
            "PUT",
            "/api/v1/daemon/fuse/takeover",
            "",
            400,
            "Upgrade(DaemonAbnormal(UnexpectedEvent(\"Takeover\")))",
        ),
        ("PUT", "/api/v1/daemon/fuse/sendfd", "", 500, "supervisor"),
        (
            "PUT",
            "/api/v1/daemon",
            r#"{"log_level":"loud"}"#,
            500,
            "Configure(ResponsePayloadType)",
        ),
        (
            "DELETE",
            "/api/v2/blobs?blob_id=1",
            "",
            501,
            "DeleteBlobObject(DaemonAbnormal(Unsupported))",
        ),
        (
            "GET",
            "/api/v1/metrics/pattern",
            "",
            404,
            "Pattern(Metrics(Stats(NoCounter)))",
        ),
        ("GET", "/api/v1/metrics?id=/1", "", 404, "NoCounter"),
        (
            "PUT",
            "/api/v1/config?id=/1",
            r#"{"x":"y"}"#,
            500,
            "unknown key",
        ),
    ] {
        let refusal = call(&api, method, target, body).unwrap_err();
        assert_eq!(refusal.0, status, "{method} {target}: {}", refusal.1);
        assert!(
            refusal.1.contains(words),
            "{method} {target}: {}",
            refusal.1
        );
    }
}

#[test]
fn levels_can_be_changed() {
    let api = api();
    for level in ["off", "error", "warn", "info", "debug", "trace"] {
        let body = format!("{{\"log_level\":\"{level}\"}}");
        assert_eq!(
            call(&api, "PUT", "/api/v1/daemon", &body),
            Ok(Answer::Nothing)
        );
    }
}
