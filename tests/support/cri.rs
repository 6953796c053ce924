//! kubelet's side of the container runtime interface, as much of it as tests need.
//!
//! Messages have only the fields that are used here; both sides of the wire skip
//! what they do not know. Field numbers are those of `runtime.v1`.

use std::path::Path;

use anyhow::{Context as _, Result};
use prost::Message;
use tokio::runtime::Runtime;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic_prost::ProstCodec;

/// `NamespaceMode.NODE`: the node's own namespace.
const NODE: i32 = 2;

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

/// Whom a pull is authenticated as, in one of these ways.
#[derive(Clone, PartialEq, Message)]
pub struct Auth {
    /// Name.
    #[prost(string, tag = "1")]
    pub username: String,
    /// Password.
    #[prost(string, tag = "2")]
    pub password: String,
    /// Both, with a colon between them, in base64.
    #[prost(string, tag = "3")]
    pub auth: String,
    /// A token that the registry's token service takes.
    #[prost(string, tag = "5")]
    pub identity_token: String,
    /// A token that the registry takes.
    #[prost(string, tag = "6")]
    pub registry_token: String,
}

#[derive(Clone, PartialEq, Message)]
struct PullImage {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    auth: Option<Auth>,
}

#[derive(Clone, PartialEq, Message)]
struct Image {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct PodMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
}

#[derive(Clone, PartialEq, Message)]
struct Namespaces {
    #[prost(int32, tag = "1")]
    network: i32,
}

#[derive(Clone, PartialEq, Message)]
struct PodSecurity {
    #[prost(message, optional, tag = "1")]
    namespaces: Option<Namespaces>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxPod {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
    #[prost(message, optional, tag = "2")]
    security: Option<PodSecurity>,
}

#[derive(Clone, PartialEq, Message)]
struct Pod {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodMetadata>,
    #[prost(string, tag = "3")]
    log_directory: String,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPod>,
}

#[derive(Clone, PartialEq, Message)]
struct RunPod {
    #[prost(message, optional, tag = "1")]
    config: Option<Pod>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint32, tag = "2")]
    attempt: u32,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerSecurity {
    #[prost(message, optional, tag = "3")]
    namespaces: Option<Namespaces>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxContainer {
    #[prost(message, optional, tag = "2")]
    security: Option<ContainerSecurity>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
    #[prost(string, tag = "11")]
    log_path: String,
    #[prost(message, optional, tag = "15")]
    linux: Option<LinuxContainer>,
}

#[derive(Clone, PartialEq, Message)]
struct CreateContainer {
    #[prost(string, tag = "1")]
    pod: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    pod_config: Option<Pod>,
}

#[derive(Clone, PartialEq, Message)]
struct Stop {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(int64, tag = "2")]
    timeout: i64,
}

/// Requests and answers that are a single id or name.
#[derive(Clone, PartialEq, Message)]
struct Id {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct ExecSync {
    #[prost(string, tag = "1")]
    container: String,
    #[prost(string, repeated, tag = "2")]
    command: Vec<String>,
    #[prost(int64, tag = "3")]
    timeout: i64,
}

/// What a command in a container left behind.
#[derive(Clone, PartialEq, Message)]
pub struct Executed {
    /// Its standard output.
    #[prost(bytes = "vec", tag = "1")]
    pub stdout: Vec<u8>,
    /// Its standard error.
    #[prost(bytes = "vec", tag = "2")]
    pub stderr: Vec<u8>,
    /// Its exit code.
    #[prost(int32, tag = "3")]
    pub exit_code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerStatus {
    #[prost(int32, tag = "3")]
    state: i32,
    #[prost(int32, tag = "7")]
    exit_code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerStatusAnswer {
    #[prost(message, optional, tag = "1")]
    status: Option<ContainerStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct Nothing {}

/// A pod that runs.
#[derive(Clone, Debug)]
pub struct RunningPod {
    id: String,
    config: Pod,
}

/// A connection to containerd.
#[derive(Debug)]
pub struct Cri {
    runtime: Runtime,
    grpc: Grpc<Channel>,
}

impl Cri {
    /// Connects to the socket of containerd.
    ///
    /// # Errors
    /// It does not listen.
    pub fn connect(address: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let channel = crate::plugin::connect(&runtime, address)?;
        Ok(Self {
            runtime,
            grpc: Grpc::new(channel),
        })
    }

    fn call<Q, A>(&mut self, service: &str, method: &str, request: Q) -> Result<A>
    where
        Q: Message + Send + 'static,
        A: Message + Default + Send + 'static,
    {
        let path: PathAndQuery = format!("/runtime.v1.{service}Service/{method}").parse()?;
        let grpc = &mut self.grpc;
        let answer = self.runtime.block_on(async {
            grpc.ready().await?;
            let codec: ProstCodec<Q, A> = ProstCodec::default();
            anyhow::Ok(grpc.unary(tonic::Request::new(request), path, codec).await)
        })?;
        let answer =
            answer.map_err(|status| anyhow::anyhow!("{:?}: {}", status.code(), status.message()));
        Ok(answer.with_context(|| method.to_owned())?.into_inner())
    }

    /// Whether containerd answers.
    ///
    /// # Errors
    /// It does not.
    pub fn version(&mut self) -> Result<()> {
        self.call::<Nothing, Nothing>("Runtime", "Version", Nothing {})
            .map(drop)
    }

    /// Pulls an image, as `login` (name and password) if that is given.
    ///
    /// # Errors
    /// What containerd says.
    pub fn pull(&mut self, image: &str, login: Option<(&str, &str)>) -> Result<()> {
        let auth = login.map(|(username, password)| Auth {
            username: username.to_owned(),
            password: password.to_owned(),
            ..Auth::default()
        });
        self.pull_as(image, auth)
    }

    /// Pulls an image with whatever kubelet may know.
    ///
    /// # Errors
    /// What containerd says.
    pub fn pull_as(&mut self, image: &str, auth: Option<Auth>) -> Result<()> {
        let request = PullImage {
            image: Some(spec(image)),
            auth,
        };
        self.call::<_, Id>("Image", "PullImage", request).map(drop)
    }

    /// Removes an image.
    ///
    /// # Errors
    /// What containerd says.
    pub fn remove_image(&mut self, image: &str) -> Result<()> {
        let request = Image {
            image: Some(spec(image)),
        };
        self.call::<_, Nothing>("Image", "RemoveImage", request)
            .map(drop)
    }

    /// Starts a pod on the node's network, with logs in `logs`.
    ///
    /// # Errors
    /// What containerd says.
    pub fn run_pod(&mut self, name: &str, logs: &Path) -> Result<RunningPod> {
        let config = Pod {
            metadata: Some(PodMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "default".to_owned(),
            }),
            log_directory: logs.display().to_string(),
            linux: Some(LinuxPod {
                cgroup_parent: String::new(),
                security: Some(PodSecurity {
                    namespaces: Some(Namespaces { network: NODE }),
                }),
            }),
        };
        let request = RunPod {
            config: Some(config.clone()),
        };
        let Id { id } = self.call("Runtime", "RunPodSandbox", request)?;
        Ok(RunningPod { id, config })
    }

    /// Makes and starts a container in `pod`; its output goes to `NAME.log` in the
    /// pod's directory of logs. Returns its id.
    ///
    /// # Errors
    /// What containerd says.
    pub fn run(
        &mut self,
        pod: &RunningPod,
        name: &str,
        image: &str,
        command: &[&str],
    ) -> Result<String> {
        let namespaces = Some(Namespaces { network: NODE });
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(spec(image)),
            command: owned(command),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainer {
                security: Some(ContainerSecurity { namespaces }),
            }),
        };
        let request = CreateContainer {
            pod: pod.id.clone(),
            config: Some(config),
            pod_config: Some(pod.config.clone()),
        };
        let Id { id } = self.call("Runtime", "CreateContainer", request)?;
        self.call::<_, Nothing>("Runtime", "StartContainer", Id { id: id.clone() })?;
        Ok(id)
    }

    /// Runs a command in a container to its end.
    ///
    /// # Errors
    /// What containerd says; a command that fails is no error.
    pub fn exec(&mut self, container: &str, command: &[&str]) -> Result<Executed> {
        let request = ExecSync {
            container: container.to_owned(),
            command: owned(command),
            timeout: 60,
        };
        self.call("Runtime", "ExecSync", request)
    }

    /// The exit code of a container; none while it runs.
    ///
    /// # Errors
    /// What containerd says.
    pub fn exit_code(&mut self, container: &str) -> Result<Option<i32>> {
        let request = Id {
            id: container.to_owned(),
        };
        let answer: ContainerStatusAnswer = self.call("Runtime", "ContainerStatus", request)?;
        let status = answer.status.context("no status")?;
        // CONTAINER_EXITED
        Ok((status.state == 2).then_some(status.exit_code))
    }

    /// Stops and removes a container.
    ///
    /// # Errors
    /// What containerd says.
    pub fn remove(&mut self, container: &str) -> Result<()> {
        let id = container.to_owned();
        let stop = Stop {
            id: id.clone(),
            timeout: 0,
        };
        self.call::<_, Nothing>("Runtime", "StopContainer", stop)?;
        self.call::<_, Nothing>("Runtime", "RemoveContainer", Id { id })
            .map(drop)
    }

    /// Stops and removes a pod with all its containers.
    ///
    /// # Errors
    /// What containerd says.
    pub fn remove_pod(&mut self, pod: &RunningPod) -> Result<()> {
        let id = || Id { id: pod.id.clone() };
        self.call::<_, Nothing>("Runtime", "StopPodSandbox", id())?;
        self.call::<_, Nothing>("Runtime", "RemovePodSandbox", id())
            .map(drop)
    }

    /// Removes every pod there is.
    ///
    /// # Errors
    /// What containerd says.
    pub fn remove_all_pods(&mut self) -> Result<()> {
        #[derive(Clone, PartialEq, Message)]
        struct Pods {
            #[prost(message, repeated, tag = "1")]
            items: Vec<Id>,
        }
        let Pods { items } = self.call("Runtime", "ListPodSandbox", Nothing {})?;
        for id in items {
            self.call::<_, Nothing>("Runtime", "StopPodSandbox", id.clone())?;
            self.call::<_, Nothing>("Runtime", "RemovePodSandbox", id)?;
        }
        Ok(())
    }
}

fn spec(image: &str) -> ImageSpec {
    ImageSpec {
        image: image.to_owned(),
    }
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}
