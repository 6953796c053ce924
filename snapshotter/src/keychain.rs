//! Accounts that kubelet passes with its pulls.
//!
//! containerd does not hand them to snapshotters. So kubelet is told that its image
//! service is here: every request of `runtime.v1.ImageService` goes on to containerd as
//! it is, and what a successful `PullImage` was authenticated with is remembered.
//!
//! Promises: accounts are in memory only, per repository, a bounded number of them, and
//! are used for the registry that they were given for and no other.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use prost::Message;
use prost::bytes::{Buf as _, BufMut as _};
use storage::oci::{Credentials, ImageRef, RegistryRef};
use tonic::client::Grpc as Client;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::codegen::{Body, BoxFuture, Context, Poll, StdError, http};
use tonic::server::{Grpc as Server, NamedService, UnaryService};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

use crate::images::Account;

/// Most repositories whose accounts are remembered.
const MAX_ACCOUNTS: usize = 4096;
/// Longest message, as kubelet and containerd have it.
const MAX_MESSAGE: usize = 16 << 20;
/// The service.
const SERVICE: &str = "runtime.v1.ImageService";
/// The method whose accounts are of interest.
const PULL: &str = "/runtime.v1.ImageService/PullImage";

/// What is remembered.
#[derive(Default)]
pub struct Keychain(Mutex<Accounts>);

#[derive(Default)]
struct Accounts {
    /// By host and repository, with the number of the pull.
    known: BTreeMap<(String, String), (u64, Account)>,
    pulls: u64,
}

impl fmt::Debug for Keychain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keychain(<redacted>)")
    }
}

/// The parts of a `PullImageRequest` that matter here; numbers are those of `runtime.v1`.
#[derive(Clone, PartialEq, Message)]
struct PullImage {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    auth: Option<Auth>,
}

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, Message)]
struct Auth {
    #[prost(string, tag = "1")]
    username: String,
    #[prost(string, tag = "2")]
    password: String,
    #[prost(string, tag = "3")]
    auth: String,
    #[prost(string, tag = "4")]
    server_address: String,
    #[prost(string, tag = "5")]
    identity_token: String,
    #[prost(string, tag = "6")]
    registry_token: String,
}

impl Keychain {
    /// The account that this repository was pulled with last.
    pub(crate) fn account(&self, place: &RegistryRef) -> Option<Account> {
        let key = (place.host.clone(), place.repository.clone());
        let accounts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        accounts.known.get(&key).map(|(_, account)| account.clone())
    }

    fn remember(&self, place: &RegistryRef, account: Account) {
        let mut accounts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        accounts.pulls += 1;
        let pull = accounts.pulls;
        let key = (place.host.clone(), place.repository.clone());
        accounts.known.insert(key, (pull, account));
        if accounts.known.len() > MAX_ACCOUNTS {
            let oldest = accounts.known.iter().min_by_key(|(_, (pull, _))| *pull);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                accounts.known.remove(&oldest);
            }
        }
    }
}

/// Whom a `PullImage` request authenticates, and where.
fn account_of(request: &[u8]) -> Option<(RegistryRef, Account)> {
    let request = PullImage::decode(request).ok()?;
    let (image, auth) = (request.image?.image, request.auth?);
    let Ok(ImageRef::Registry(place)) = image.parse() else {
        return None;
    };
    if !auth.server_address.is_empty() && host_of(&auth.server_address) != place.host {
        return None;
    }
    Some((place, account_in(auth)?))
}

/// The account that is meant, as containerd understands it: the first of name and
/// password, identity token, both in one word, and a token for the registry itself.
fn account_in(auth: Auth) -> Option<Account> {
    let account = |username: &str, password: &str| Account {
        username: username.to_owned(),
        password: password.to_owned(),
    };
    let token = |credentials: Credentials| {
        let (username, password) = credentials.pair()?;
        Some(account(username, password))
    };
    if !auth.username.is_empty() {
        return Some(account(&auth.username, &auth.password));
    }
    if !auth.identity_token.is_empty() {
        return token(Credentials::Identity(auth.identity_token));
    }
    if !auth.auth.is_empty() {
        let decoded = base64::engine::general_purpose::STANDARD.decode(&auth.auth);
        let decoded = String::from_utf8(decoded.ok()?).ok()?;
        let (username, password) = decoded.split_once(':')?;
        return Some(account(username, password.trim_end_matches('\0')));
    }
    if auth.registry_token.is_empty() {
        return None;
    }
    token(Credentials::Bearer(auth.registry_token))
}

/// The host in an address, whose well-known name stays what references have.
fn host_of(address: &str) -> &str {
    let address = address.split_once("://").map_or(address, |(_, rest)| rest);
    match address.split('/').next().unwrap_or_default() {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    }
}

/// The image service in front of containerd's.
#[derive(Clone, Debug)]
pub struct ImageService {
    containerd: Channel,
    keychain: Arc<Keychain>,
}

impl ImageService {
    /// In front of the containerd that listens on `address`, which need not run yet.
    ///
    /// # Errors
    /// The address is none.
    pub fn new(address: &Path, keychain: Arc<Keychain>) -> anyhow::Result<Self> {
        let endpoint = Endpoint::from_shared(format!("unix://{}", address.display()))?;
        Ok(Self {
            containerd: endpoint.connect_lazy(),
            keychain,
        })
    }

    async fn forward(
        self,
        path: PathAndQuery,
        request: Request<Vec<u8>>,
    ) -> Result<Response<Vec<u8>>, Status> {
        let account = (path.as_str() == PULL)
            .then(|| account_of(request.get_ref()))
            .flatten();
        let mut client = Client::new(self.containerd)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        let ready = client.ready().await;
        ready.map_err(|error| {
            Status::unavailable(format!("containerd cannot be reached: {error}"))
        })?;
        let answer = client.unary(request, path, Raw).await?;
        // Wrong ones are of no use to anybody.
        if let Some((place, account)) = account {
            tracing::debug!("{}/{}: account remembered", place.host, place.repository);
            self.keychain.remember(&place, account);
        }
        Ok(answer)
    }
}

impl NamedService for ImageService {
    const NAME: &'static str = SERVICE;
}

impl<B> tonic::codegen::Service<http::Request<B>> for ImageService
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let path = request.uri().path_and_query().cloned();
        let method = Method {
            service: self.clone(),
            path: path.unwrap_or_else(|| PathAndQuery::from_static("/")),
        };
        Box::pin(async move {
            let mut server = Server::new(Raw)
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE);
            Ok(server.unary(method, request).await)
        })
    }
}

/// One method of the service.
struct Method {
    service: ImageService,
    path: PathAndQuery,
}

impl UnaryService<Vec<u8>> for Method {
    type Response = Vec<u8>;
    type Future = BoxFuture<Response<Vec<u8>>, Status>;

    fn call(&mut self, request: Request<Vec<u8>>) -> Self::Future {
        Box::pin(self.service.clone().forward(self.path.clone(), request))
    }
}

/// Messages as they are: fields that nobody here knows arrive, too.
#[derive(Clone, Copy, Debug)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining()).into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(image: &str, auth: Auth) -> Vec<u8> {
        let image = Some(ImageSpec {
            image: image.to_owned(),
        });
        PullImage {
            image,
            auth: Some(auth),
        }
        .encode_to_vec()
    }

    fn auth(fields: [&str; 4]) -> Auth {
        let [username, password, auth, server_address] = fields.map(str::to_owned);
        Auth {
            username,
            password,
            auth,
            server_address,
            ..Auth::default()
        }
    }

    #[test]
    fn accounts_are_taken_from_pulls_for_their_registry() {
        for (image, fields, expected) in [
            ("r.io/a:1", ["u", "p", "", ""], true),
            ("r.io/a:1", ["", "", "dTpw", ""], true),
            ("r.io/a:1", ["u", "p", "", "https://r.io/v2"], true),
            ("r.io/a:1", ["u", "p", "", "https://other.io"], false),
            ("r.io/a:1", ["", "", "no base64", ""], false),
            ("r.io/a:1", ["", "", "", ""], false),
            ("a", ["u", "p", "", "https://index.docker.io/v1/"], true),
        ] {
            let found = account_of(&request(image, auth(fields)));
            let found = found.map(|(_, account)| (account.username, account.password));
            let expected = expected.then(|| ("u".to_owned(), "p".to_owned()));
            assert_eq!(found, expected, "{image} {fields:?}");
        }
        assert!(account_of(b"\xff\xff").is_none());
    }

    #[test]
    fn tokens_are_accounts_of_their_own_kind() {
        let found = |auth: Auth| {
            let (_, account) = account_of(&request("r.io/a:1", auth))?;
            Some(Credentials::of_pair(&account.username, &account.password))
        };
        let identity = Auth {
            identity_token: "i".to_owned(),
            registry_token: "r".to_owned(),
            ..Auth::default()
        };
        let bearer = Auth {
            registry_token: "r".to_owned(),
            ..Auth::default()
        };
        assert_eq!(found(identity), Some(Credentials::Identity("i".to_owned())));
        assert_eq!(found(bearer), Some(Credentials::Bearer("r".to_owned())));
        assert_eq!(found(Auth::default()), None);
    }

    #[test]
    fn the_latest_accounts_are_remembered() {
        let keychain = Keychain::default();
        let place = |repository: usize| match format!("r.io/x{repository}:1").parse() {
            Ok(ImageRef::Registry(place)) => place,
            other => panic!("{other:?}"),
        };
        let account = |name: usize| Account {
            username: name.to_string(),
            password: String::new(),
        };
        for index in 0..=MAX_ACCOUNTS {
            keychain.remember(&place(index), account(index));
        }
        keychain.remember(&place(7), account(8));
        assert!(keychain.account(&place(0)).is_none());
        assert_eq!(keychain.account(&place(1)), Some(account(1)));
        assert_eq!(keychain.account(&place(7)), Some(account(8)));
        assert!(!format!("{keychain:?}").contains('8'));
    }
}
