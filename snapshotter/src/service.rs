//! Requests of containerd to domain and back; nothing is decided here.
//!
//! All work blocks, so each request runs on a thread that may block.

use std::sync::Arc;
use std::time::SystemTime;

use prost_types::Timestamp;
use tokio_stream::Iter;
use tonic::{Request, Response, Status};

use crate::api::snapshots as wire;
use crate::api::snapshots::snapshots_server::Snapshots as Api;
use crate::error::Error;
use crate::labels::Labels;
use crate::lifecycle::Snapshots;
use crate::store::{Kind, Record, since_1970};

/// Snapshots per message of a list: far below the size that clients accept.
const PER_MESSAGE: usize = 100;

/// The service.
#[derive(Debug)]
pub struct Service(pub Arc<Snapshots>);

impl Service {
    async fn run<T: Send + 'static>(
        &self,
        request: &'static str,
        work: impl FnOnce(&Snapshots) -> Result<T, Error> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let snapshots = Arc::clone(&self.0);
        let outcome = tokio::task::spawn_blocking(move || work(&snapshots)).await;
        match outcome {
            Ok(Ok(answer)) => {
                tracing::debug!("{request}: done");
                Ok(Response::new(answer))
            }
            Ok(Err(error)) => {
                let status = Status::from(error);
                match status.code() {
                    tonic::Code::Internal | tonic::Code::Unavailable => {
                        tracing::error!("{request}: {}", status.message());
                    }
                    code => tracing::debug!("{request}: {code:?}: {}", status.message()),
                }
                Err(status)
            }
            Err(crashed) => {
                tracing::error!("{request}: {crashed}");
                Err(Status::internal(format!("{request} crashed, see the log")))
            }
        }
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Api for Service {
    async fn prepare(
        &self,
        request: Request<wire::PrepareSnapshotRequest>,
    ) -> Answer<wire::PrepareSnapshotResponse> {
        let request = request.into_inner();
        self.run("Prepare", move |snapshots| {
            let mounts =
                snapshots.prepare(&request.key, some(&request.parent), labels(request.labels))?;
            Ok(wire::PrepareSnapshotResponse { mounts })
        })
        .await
    }

    async fn view(
        &self,
        request: Request<wire::ViewSnapshotRequest>,
    ) -> Answer<wire::ViewSnapshotResponse> {
        let request = request.into_inner();
        self.run("View", move |snapshots| {
            let mounts =
                snapshots.view(&request.key, some(&request.parent), labels(request.labels))?;
            Ok(wire::ViewSnapshotResponse { mounts })
        })
        .await
    }

    async fn mounts(&self, request: Request<wire::MountsRequest>) -> Answer<wire::MountsResponse> {
        let key = request.into_inner().key;
        self.run("Mounts", move |snapshots| {
            let mounts = snapshots.mounts(&key)?;
            Ok(wire::MountsResponse { mounts })
        })
        .await
    }

    async fn commit(&self, request: Request<wire::CommitSnapshotRequest>) -> Answer<()> {
        let request = request.into_inner();
        self.run("Commit", move |snapshots| {
            snapshots.commit(&request.name, &request.key, labels(request.labels))
        })
        .await
    }

    async fn remove(&self, request: Request<wire::RemoveSnapshotRequest>) -> Answer<()> {
        let key = request.into_inner().key;
        self.run("Remove", move |snapshots| snapshots.remove(&key))
            .await
    }

    async fn stat(
        &self,
        request: Request<wire::StatSnapshotRequest>,
    ) -> Answer<wire::StatSnapshotResponse> {
        let key = request.into_inner().key;
        self.run("Stat", move |snapshots| {
            let info = Some(info(snapshots.stat(&key)?));
            Ok(wire::StatSnapshotResponse { info })
        })
        .await
    }

    async fn update(
        &self,
        request: Request<wire::UpdateSnapshotRequest>,
    ) -> Answer<wire::UpdateSnapshotResponse> {
        let request = request.into_inner();
        let given = request.info.unwrap_or_default();
        let paths = request.update_mask.unwrap_or_default().paths;
        self.run("Update", move |snapshots| {
            let record = snapshots.update(&given.name, labels(given.labels), &paths)?;
            Ok(wire::UpdateSnapshotResponse {
                info: Some(info(record)),
            })
        })
        .await
    }

    type ListStream = Iter<std::vec::IntoIter<Result<wire::ListSnapshotsResponse, Status>>>;

    async fn list(&self, request: Request<wire::ListSnapshotsRequest>) -> Answer<Self::ListStream> {
        let filters = request.into_inner().filters;
        self.run("List", move |snapshots| {
            let records = snapshots.list(&filters)?;
            let messages: Vec<_> = records
                .chunks(PER_MESSAGE)
                .map(|records| {
                    let info = records.iter().cloned().map(info).collect();
                    Ok(wire::ListSnapshotsResponse { info })
                })
                .collect();
            Ok(tokio_stream::iter(messages))
        })
        .await
    }

    async fn usage(&self, request: Request<wire::UsageRequest>) -> Answer<wire::UsageResponse> {
        let key = request.into_inner().key;
        self.run("Usage", move |snapshots| {
            let usage = snapshots.usage(&key)?;
            Ok(wire::UsageResponse {
                size: i64::try_from(usage.bytes).unwrap_or(i64::MAX),
                inodes: i64::try_from(usage.inodes).unwrap_or(i64::MAX),
            })
        })
        .await
    }

    async fn cleanup(&self, _request: Request<wire::CleanupRequest>) -> Answer<()> {
        self.run("Cleanup", Snapshots::cleanup).await
    }
}

/// On the wire, an empty name is none.
fn some(name: &str) -> Option<&str> {
    (!name.is_empty()).then_some(name)
}

fn labels(labels: std::collections::HashMap<String, String>) -> Labels {
    labels.into_iter().collect()
}

fn info(record: Record) -> wire::Info {
    let kind = match record.kind {
        Kind::View => wire::Kind::View,
        Kind::Active => wire::Kind::Active,
        Kind::Committed => wire::Kind::Committed,
    };
    wire::Info {
        name: record.name,
        parent: record.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: Some(timestamp(record.created)),
        updated_at: Some(timestamp(record.updated)),
        labels: record.labels.into_iter().collect(),
    }
}

fn timestamp(time: SystemTime) -> Timestamp {
    let time = since_1970(time);
    Timestamp {
        seconds: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        // Below a thousand million.
        nanos: i32::try_from(time.subsec_nanos()).unwrap_or_default(),
    }
}
