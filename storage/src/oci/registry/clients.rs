//! The HTTP clients of one registry.

use std::time::Duration;

use oci_client::Client;
use oci_client::client::{ClientConfig, ClientProtocol};

use super::{CONNECT_DEADLINE, READ_DEADLINE};
use crate::oci::error::Cause;

/// Told to registries.
const USER_AGENT: &str = concat!("nydus/", env!("CARGO_PKG_VERSION"));

/// Clients with different deadlines.
pub(super) struct Clients {
    /// Has a read deadline, which would also cut long uploads.
    pub(super) pull: Client,
    /// Has none; uploads are watched while they run.
    pub(super) push: Client,
    /// For manifests and log-ins.
    pub(super) http: reqwest::Client,
}

impl Clients {
    /// Builds the clients; `plain` for plain HTTP.
    pub(super) fn new(plain: bool) -> Result<Self, Cause> {
        // Fails if the process has chosen a provider already, which then serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // First of all: this reports a system without CA certificates, with which
        // `oci-client` would panic, even for plain HTTP.
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_DEADLINE)
            .read_timeout(READ_DEADLINE)
            .user_agent(USER_AGENT)
            .build()?;
        let client = |read_timeout: Option<Duration>| {
            Client::try_from(ClientConfig {
                protocol: if plain {
                    ClientProtocol::Http
                } else {
                    ClientProtocol::Https
                },
                use_monolithic_push: true,
                read_timeout,
                connect_timeout: Some(CONNECT_DEADLINE),
                user_agent: USER_AGENT,
                ..ClientConfig::default()
            })
        };
        Ok(Self {
            pull: client(Some(READ_DEADLINE))?,
            push: client(None)?,
            http,
        })
    }
}
