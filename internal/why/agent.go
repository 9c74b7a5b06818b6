package why

import (
	"regexp"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
)

// maxSkew is how far two clocks may be apart before that is a cause.
const maxSkew = 30 * time.Second

func clock(t *timestamppb.Timestamp) string {
	if t == nil {
		return "a time unknown"
	}
	return t.AsTime().UTC().Format(time.RFC3339)
}

// neverSynced says why an agent has nothing to go by.
func (d *diagnosis) neverSynced() *Cause {
	if c := d.agent(); c != nil {
		c.Text += "; the agent has had nothing from its CA since it started, so that it knows no entries"
		return c
	}
	return cause(AgentNeverSynced, "the agent has had nothing from its CA since it started (%s)", d.status.GetState())
}

// agent says what is wrong between the agent and its CA, or is nil.
func (d *diagnosis) agent() *Cause {
	s := d.status
	text := strings.Join([]string{s.GetDetail(), s.GetCa().GetError()}, "; ")
	text = strings.Trim(text, "; ")
	switch {
	case s.GetState() == "banned":
		return cause(AgentBanned, "an operator has banned this node's agent: the CA issues nothing to it").fix("signet agent unban %s", quote(s.GetId()))
	case s.GetCa().GetConnected():
		return d.skew()
	}
	if c := d.skew(); c != nil {
		return c
	}
	if since := s.GetCa().GetSince(); since != nil {
		text += ", no contact since " + clock(since)
	}
	c := d.contact(text)
	if end := s.GetNotAfter(); end != nil && !d.agentNow().Before(end.AsTime()) && c.Code != CAUnreachable {
		c = cause(AgentSVIDExpired, "the agent's own SVID ended at %s, and it could not win it back: %s", clock(end), text).
			fix("%s", "# with a join token: signet token create, then put it into join_token_file on this node").
			fix("signet agent show %s", quote(s.GetId()))
	}
	return c
}

// agentNow is the agent's clock.
func (d *diagnosis) agentNow() time.Time {
	if t := d.status.GetNow(); t != nil {
		return t.AsTime()
	}
	return d.now
}

// skew compares the agent's clock with that of who asks: both are of one machine, unless one of them was set otherwise, and
// with what the CA wrote into the agent's SVID.
func (d *diagnosis) skew() *Cause {
	if apart := d.agentNow().Sub(d.now).Abs(); apart > maxSkew {
		return cause(ClockWrong, "the agent's clock says %s, and the one here %s: they are %s apart, so that SVIDs are not valid yet, or not any more, for one of them",
			d.agentNow().UTC().Format(time.RFC3339), d.now.UTC().Format(time.RFC3339), apart.Round(time.Second)).
			fix("# set both clocks by NTP: timedatectl status; chronyc tracking")
	}
	return nil
}

var (
	notYetValid   = regexp.MustCompile(`certificate has expired or is not yet valid|not valid yet|not yet valid|current time \S+ is (before|after)`)
	notTrusted    = regexp.MustCompile(`signed by unknown authority|unknown authority|does not verify|did not present the authority|certificate signed by|no X.509 bundle|no bundle`)
	otherTD       = regexp.MustCompile(`the server at server_address is "?spiffe://([^"/]+)/|is not in trust domain|trust domain "?([^" ]+)"? .*(unknown|no bundle)|no X\.509 bundle (?:found )?for trust domain:? "?([^" ]+)`)
	evicted       = regexp.MustCompile(`the CA does not know this agent|agent is not attested|not attested`)
	tokenRefused  = regexp.MustCompile(`failed to attest|join token|no join token that was not used|node_attestation`)
	superseded    = regexp.MustCompile(`another SVID of this agent`)
	agentExpired  = regexp.MustCompile(`the agent's SVID has expired|tls: (?:bad|expired) certificate|tls: certificate required`)
	unreachableIn = regexp.MustCompile(`connection refused|no such host|i/o timeout|no route to host|network is unreachable|connection reset|EOF|deadline exceeded|not reachable|Unavailable`)
)

// contact says what an error of the contact to the CA means.
func (d *diagnosis) contact(text string) *Cause {
	s := d.status
	at := s.GetCa().GetAddress()
	switch {
	case otherTD.MatchString(text):
		return cause(CAOtherTrustDomain, "what answers at %s is not the CA of %s: %s", at, s.GetTrustDomain(), text).
			fix("# correct server_address or trust_domain in the agent's configuration")
	case notTrusted.MatchString(text):
		c := cause(CANotTrusted, "the CA at %s is not verified by the bundle that the agent holds: it was made anew, or another one answers there: %s", at, text)
		if s.GetAttestor() == "join_token" {
			return c.fix("# if it was made anew, on the CA: signet token create; put the token into join_token_file on this node")
		}
		return c.fix("# on the CA: signet bundle show --format pem, compare, and put it into trust_bundle_path on this node")
	case notYetValid.MatchString(text):
		return cause(ClockWrong, "the clocks of this node and of the CA disagree, or the CA's certificate has ended: %s", text).
			fix("# set both clocks by NTP: timedatectl status; chronyc tracking")
	case evicted.MatchString(text):
		return cause(AgentEvicted, "the CA does not know this agent any more: it was evicted, or the CA's state is another one: %s", text).
			fix("# on the CA: signet token create; put the token into join_token_file on this node")
	case agentExpired.MatchString(text), superseded.MatchString(text):
		return cause(AgentSVIDExpired, "the CA does not take the agent's SVID: %s", text).
			fix("# on the CA: signet token create; put the token into join_token_file on this node")
	case tokenRefused.MatchString(text) && !strings.Contains(text, "connection"):
		return cause(AttestationRefused, "the CA does not take what this node shows of itself (%s): %s", s.GetAttestor(), text).
			fix("# with a join token: signet token create, then put it into join_token_file on this node")
	case unreachableIn.MatchString(text), s.GetCa().GetSince() != nil:
		return cause(CAUnreachable, "the agent has no contact to its CA at %s: %s", at, text).
			fix("# on the CA's host: signet ca info").
			fix("# from this node: is %s the right address, and does a firewall let it through?", at)
	case text == "" || s.GetState() == "starting" || s.GetState() == "connecting" || s.GetState() == "attesting":
		return cause(CAUnreachable, "the agent is still %s to its CA at %s", s.GetState(), at)
	}
	return cause(AgentNeverSynced, "the agent is %s: %s", s.GetState(), text)
}

var (
	issueDisk    = regexp.MustCompile(`disk is full`)
	issueSign    = regexp.MustCompile(`the CA cannot sign now`)
	issueLimited = regexp.MustCompile(`ResourceExhausted|limit`)
	issueTTL     = regexp.MustCompile(`outlive|end of the authority|ends before|authority ends|longer than`)
	issueGone    = regexp.MustCompile(`entry not found or not authorized`)
	issueClock   = regexp.MustCompile(`do the clocks of CA and agent agree|not valid yet|it ends at .* before`)
	issueReach   = regexp.MustCompile(`not reachable|connection|the CA did not answer|DeadlineExceeded|transport`)
	issueBroken  = regexp.MustCompile(`it is for another key|it is for "|certificate \d+:|the chain has|it is empty`)
)

// issue says why there is no SVID for an entry that matches.
func (d *diagnosis) issue(c *agentv1.Candidate) *Cause {
	trouble := d.agent()
	text := c.GetIssuance().GetError()
	said := text
	if at := c.GetIssuance().GetFailedAt(); at != nil {
		said += ", at " + clock(at)
	}
	who := "entry " + c.GetEntryId() + " for " + c.GetSpiffeId() + " matches"
	if c.GetSvid().GetValid() {
		who += ", its SVID is valid until " + clock(c.GetSvid().GetNotAfter())
	}
	switch {
	case trouble != nil:
		trouble.Text = who + ", and it cannot be renewed or issued: " + trouble.Text
		return trouble
	case text == "" && c.GetSvid() == nil:
		return cause(IssuePending, "%s; its SVID is being asked for", who)
	case issueDisk.MatchString(text):
		return cause(CADiskFull, "%s, and the CA issues nothing because its disk is full: %s", who, said).fix("# on the CA's host: df -h; free space on the disk of data_dir and of audit.dir")
	case issueClock.MatchString(text):
		return cause(ClockWrong, "%s, and what the CA issues is not valid by this node's clock: %s", who, said).fix("# set both clocks by NTP: timedatectl status; chronyc tracking")
	case issueTTL.MatchString(text):
		return cause(TTLBeyondAuthority, "%s, and its SVID would outlive the authority: %s", who, said).fix("signet explain ttl %s", quote(c.GetEntryId()))
	case issueSign.MatchString(text):
		return cause(CACannotSign, "%s, and the CA has no authority that can sign now: %s", who, said).fix("signet authority list")
	case issueLimited.MatchString(text):
		return cause(CARateLimited, "%s, and the CA lets this agent ask no faster: %s", who, said).fix("# raise limits in the CA's configuration, or wait until the agent has caught up")
	case issueBroken.MatchString(text):
		return cause(IssuedUnusable, "%s, and what the CA issued is unusable and was not handed on: %s", who, said)
	case issueGone.MatchString(text):
		return cause(EntryDeleted, "%s, and the CA says that it is gone: %s", who, said)
	case issueReach.MatchString(text):
		return cause(CAUnreachable, "%s, and the CA cannot be reached: %s", who, said)
	case text != "":
		return cause(CARefused, "%s, and the CA refuses to issue: %s", who, said).fix("signet explain ttl %s", quote(c.GetEntryId()))
	}
	return cause(IssuePending, "%s; its SVID is being renewed", who)
}
