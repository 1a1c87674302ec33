"""What the endpoint counts, for Prometheus to fetch."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SIZES = [10.0**e for e in range(2, 9)]
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one endpoint, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        r = self.registry
        self.requests = Counter("scgpt_batch_requests", "Requests answered, by HTTP status", ["status"], registry=r)
        self.seconds = Histogram(
            "scgpt_batch_request_seconds", "From the whole request to its whole answer", buckets=SECONDS, registry=r
        )
        self.request_bytes = Histogram(
            "scgpt_batch_request_bytes", "Request bodies as they came", buckets=SIZES, registry=r
        )
        self.answer_bytes = Histogram("scgpt_batch_answer_bytes", "Answer bodies", buckets=SIZES, registry=r)
        self.in_flight = Gauge("scgpt_batch_requests_in_flight", "Requests taken and not yet answered", registry=r)
        self.batch_requests = Histogram(
            "scgpt_batch_device_batch_requests",
            "Requests answered by one call",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=r,
        )
        self.unauthorized = Counter("scgpt_batch_unauthorized_requests", "Requests without a valid token", registry=r)
        self.refused_connections = Counter(
            "scgpt_batch_refused_connections", "Connections closed by a limit, by its name", ["limit"], registry=r
        )
        self.spooled = Counter("scgpt_batch_log_spooled", "Records written to the spool", registry=r)
        self.logged = Counter("scgpt_batch_log_written", "Records written to the inference table", registry=r)
        self.log_failures = Counter(
            "scgpt_batch_log_failures",
            "Failed writes: to the spool (a record is lost), to the table",
            ["to"],
            registry=r,
        )
        self.log_moved_aside = Counter(
            "scgpt_batch_log_moved_aside", "Spool files with something else than records, moved aside", registry=r
        )
        self.spool_bytes = Gauge("scgpt_batch_log_spool_bytes", "Bytes that wait for the inference table", registry=r)
        for to in ("spool", "table"):
            self.log_failures.labels(to)  # 0 is seen, not absent

    def text(self) -> bytes:
        """Give all of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def totals(self) -> dict[str, int]:
        """Sum up for the command's last line."""

        def total(counter: Counter) -> int:
            return int(
                sum(s.value for family in counter.collect() for s in family.samples if s.name.endswith("_total"))
            )

        return {"requests": total(self.requests), "logged": total(self.logged)}
