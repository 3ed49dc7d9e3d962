//! The sink in Kafka: one record of a topic for each of ours, its key the source, acknowledged by all replicas.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use rskafka::BackoffConfig;
use rskafka::chrono::DateTime;
use rskafka::client::error::{Error, ProtocolError};
use rskafka::client::partition::{Compression, PartitionClient, UnknownTopicHandling};
use rskafka::client::{Client, ClientBuilder, Credentials, SaslConfig};
use rskafka::record::Record;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::sink::{Batch, KafkaSettings, Refused};

/// How long finding the brokers, and delivering to them, may take.
const LIMIT: Duration = Duration::from_secs(30);

pub(crate) struct Kafka {
    settings: KafkaSettings,
    tls: Option<Arc<rustls::ClientConfig>>,
    /// Until something goes wrong.
    partitions: Vec<PartitionClient>,
}

impl Kafka {
    pub(crate) fn open(settings: &KafkaSettings) -> Result<Self, String> {
        let tls = settings.ca_file.as_ref().map(|path| {
            let told = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
            let mut roots = rustls::RootCertStore::empty();
            for certificate in CertificateDer::pem_file_iter(path).map_err(|error| told(&error))? {
                roots.add(certificate.map_err(|error| told(&error))?).map_err(|error| told(&error))?;
            }
            Ok::<_, String>(Arc::new(
                rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth(),
            ))
        });
        Ok(Self { settings: settings.clone(), tls: tls.transpose()?, partitions: Vec::new() })
    }

    pub(crate) async fn produce(&mut self, batch: &Batch, records: Range<usize>) -> Result<(), Refused> {
        let done = match tokio::time::timeout(LIMIT, self.try_produce(batch, records)).await {
            Ok(done) => done,
            Err(_) => Err(Refused::Later("the brokers do not answer in time".to_owned())),
        };
        if matches!(done, Err(Refused::Later(_))) {
            // Leaders may have changed: they are looked for anew.
            self.partitions.clear();
        }
        done
    }

    async fn try_produce(&mut self, batch: &Batch, records: Range<usize>) -> Result<(), Refused> {
        if self.partitions.is_empty() {
            self.partitions = self.connect().await?;
        }
        let now = DateTime::from_timestamp_millis(jiff::Timestamp::now().as_millisecond()).unwrap_or_default();
        let mut of_each: BTreeMap<usize, Vec<Record>> = BTreeMap::new();
        for number in records {
            let mut hasher = DefaultHasher::new();
            batch.key(number).hash(&mut hasher);
            let text = batch.text(&(number..number + 1));
            of_each.entry((hasher.finish() % self.partitions.len() as u64) as usize).or_default().push(Record {
                key: Some(batch.key(number).as_bytes().to_vec()),
                value: Some(text.strip_suffix(b"\n").unwrap_or(text).to_vec()),
                headers: BTreeMap::new(),
                timestamp: now,
            });
        }
        for (partition, records) in of_each {
            self.partitions[partition]
                .produce(records, Compression::NoCompression)
                .await
                .map_err(|error| refused(&error))?;
        }
        Ok(())
    }

    async fn connect(&self) -> Result<Vec<PartitionClient>, Refused> {
        let KafkaSettings { brokers, topic, user, .. } = &self.settings;
        let backoff = BackoffConfig { deadline: Some(LIMIT), ..BackoffConfig::default() };
        let mut builder = ClientBuilder::new(brokers.clone()).client_id("joey").backoff_config(backoff);
        if let Some((user, file)) = user {
            let password = tokio::fs::read_to_string(file).await;
            let password = password.map_err(|error| Refused::Later(format!("{}: {error}", file.display())))?;
            let credentials = Credentials::new(user.clone(), password.trim_end_matches('\n').to_owned());
            builder = builder.sasl_config(SaslConfig::Plain(credentials));
        }
        if let Some(tls) = &self.tls {
            builder = builder.tls_config(tls.clone());
        }
        let client: Client = builder.build().await.map_err(|error| refused(&error))?;
        let topics = client.list_topics().await.map_err(|error| refused(&error))?;
        let Some(found) = topics.into_iter().find(|found| found.name == *topic) else {
            return Err(Refused::Later(format!("the brokers have no topic \"{topic}\"")));
        };
        let mut partitions = Vec::new();
        for number in found.partitions {
            let partition = client.partition_client(topic, number, UnknownTopicHandling::Error).await;
            partitions.push(partition.map_err(|error| refused(&error))?);
        }
        match partitions.is_empty() {
            true => Err(Refused::Later(format!("topic \"{topic}\" has no partitions"))),
            false => Ok(partitions),
        }
    }
}

fn refused(error: &Error) -> Refused {
    use ProtocolError::{CorruptMessage, InvalidRecord, MessageTooLarge, RecordListTooLarge};
    match error {
        Error::ServerError {
            protocol_error: CorruptMessage | InvalidRecord | MessageTooLarge | RecordListTooLarge,
            ..
        } => Refused::Never(error.to_string()),
        _ => Refused::Later(error.to_string()),
    }
}
