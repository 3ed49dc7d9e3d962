#!/usr/bin/env bash
# Fetches the broker that tests/kafka/pom.xml names into .tools/kafka, once. Needs Java 17 and Maven; without them it says so, and the
# test of the sink in Kafka passes without having been one.
set -euo pipefail
cd "$(dirname "$0")/.."

jars=.tools/kafka
[ "$(cat $jars/.pom 2>/dev/null || true)" = "$(sha256sum <tests/kafka/pom.xml)" ] && exit 0
if ! command -v java >/dev/null || ! command -v mvn >/dev/null; then
    echo '******************************************************************************' >&2
    echo '* SKIPPED: the log sink in Kafka is not tested; it needs Java 17 and Maven    *' >&2
    echo '******************************************************************************' >&2
    exit 0
fi
rm -rf $jars
mvn -q -B -f tests/kafka/pom.xml dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$PWD/$jars"
sha256sum <tests/kafka/pom.xml >$jars/.pom
