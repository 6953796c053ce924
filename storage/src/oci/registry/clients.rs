//! The HTTP clients of one registry.

use std::sync::OnceLock;
use std::time::Duration;

use oci_client::Client;
use oci_client::client::{ClientConfig, ClientProtocol};

use super::retry::Failure;
use super::{CONNECT_DEADLINE, READ_DEADLINE};
use crate::oci::error::Cause;

/// Told to registries.
const USER_AGENT: &str = concat!("nydus/", env!("CARGO_PKG_VERSION"));

/// Clients with different deadlines.
pub(super) struct Clients {
    plain: bool,
    pull: OnceLock<Client>,
    push: OnceLock<Client>,
    /// For manifests, downloads and log-ins.
    pub(super) http: reqwest::Client,
}

/// An HTTP client as registries get it: its deadlines, its name, and TLS.
pub fn builder() -> reqwest::ClientBuilder {
    // Fails if the process has chosen a provider already, which then serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder()
        .connect_timeout(CONNECT_DEADLINE)
        .read_timeout(READ_DEADLINE)
        .user_agent(USER_AGENT)
}

impl Clients {
    /// Builds what everybody needs; `plain` for plain HTTP.
    pub(super) fn new(plain: bool) -> Result<Self, Cause> {
        // First of all: this reports a system without CA certificates, with which
        // `oci-client` would panic, even for plain HTTP.
        let http = builder().build()?;
        Ok(Self {
            plain,
            pull: OnceLock::new(),
            push: OnceLock::new(),
            http,
        })
    }

    /// Has a read deadline, which would also cut long uploads.
    pub(super) fn pull(&self) -> Result<&Client, Failure> {
        self.get(&self.pull, Some(READ_DEADLINE))
    }

    /// Has none; uploads are watched while they run.
    pub(super) fn push(&self) -> Result<&Client, Failure> {
        self.get(&self.push, None)
    }

    /// Built when it is needed: each reads all certificates of the system, which takes
    /// longer than to answer a request, and a mount needs none.
    fn get<'a>(
        &self,
        place: &'a OnceLock<Client>,
        read_timeout: Option<Duration>,
    ) -> Result<&'a Client, Failure> {
        if let Some(client) = place.get() {
            return Ok(client);
        }
        let client = Client::try_from(ClientConfig {
            protocol: if self.plain {
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
        .map_err(Failure::of_client)?;
        Ok(place.get_or_init(|| client))
    }
}
