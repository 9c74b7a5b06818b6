package auditlog

// The values of Record.Outcome.
const (
	Done    = "ok"      // it was done
	Refused = "refused" // the caller may not, or asked for what cannot be
	Failed  = "failed"  // it was tried, and something else kept it from being done
)
