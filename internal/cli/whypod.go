package cli

import (
	"strings"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
)

// whyPod is what the CA makes of a pod, as -o json has it.
type whyPod struct {
	Cluster        string         `json:"cluster"`
	Namespace      string         `json:"namespace"`
	Name           string         `json:"name"`
	UID            string         `json:"uid,omitempty"`
	State          string         `json:"state"`
	Detail         string         `json:"detail,omitempty"`
	ServiceAccount string         `json:"service_account,omitempty"`
	Node           string         `json:"node,omitempty"`
	NodeUID        string         `json:"node_uid,omitempty"`
	Static         bool           `json:"static,omitempty"`
	Unplaced       string         `json:"unplaced,omitempty"`
	Agents         []whyNodeAgent `json:"agents,omitempty"`
	Rules          []whyRule      `json:"rules,omitempty"`
	MoreRules      int64          `json:"more_rules,omitempty"`
}

type whyNodeAgent struct {
	ID        string `json:"id"`
	ExpiresAt string `json:"expires_at,omitempty"`
	Banned    bool   `json:"banned,omitempty"`
}

type whyRule struct {
	Rule             string          `json:"rule"`
	EntryID          string          `json:"entry_id,omitempty"`
	SPIFFEID         string          `json:"spiffe_id,omitempty"`
	ProcessSelectors []string        `json:"process_selectors,omitempty"`
	Expired          bool            `json:"expired,omitempty"`
	MissingOn        []string        `json:"missing_on,omitempty"`
	Refused          string          `json:"refused,omitempty"`
	Differences      []whyDifference `json:"differences,omitempty"`
}

func whyPodOf(x *adminv1.ExplainedPod) *whyPod {
	if x == nil {
		return nil
	}
	out := &whyPod{Cluster: x.GetCluster(), Namespace: x.GetNamespace(), Name: x.GetName(), UID: x.GetUid(), State: x.GetState(), Detail: x.GetDetail(), ServiceAccount: x.GetServiceAccount(),
		Node: x.GetNodeName(), NodeUID: x.GetNodeUid(), Static: x.GetMirror(), Unplaced: x.GetUnplaced(), MoreRules: x.GetMoreRules()}
	for _, a := range x.GetAgents() {
		out.Agents = append(out.Agents, whyNodeAgent{a.GetId(), stampOf(a.GetExpiresAt()), a.GetBanned()})
	}
	for _, r := range x.GetRules() {
		one := whyRule{Rule: r.GetRule(), EntryID: r.GetEntryId(), SPIFFEID: r.GetSpiffeId(), ProcessSelectors: r.GetProcessSelectors(), Expired: r.GetExpired(), MissingOn: r.GetMissingOn(), Refused: r.GetRefused()}
		for _, d := range r.GetDifferences() {
			one.Differences = append(one.Differences, whyDifference{d.GetWant(), d.GetKind(), d.GetHave()})
		}
		out.Rules = append(out.Rules, one)
	}
	return out
}

// pod writes what the CA makes of a pod.
func (w *whyPrinter) pod(x *adminv1.ExplainedPod) {
	if x == nil {
		return
	}
	w.b.WriteByte('\n')
	what := "pod " + x.GetNamespace() + "/" + x.GetName() + " of cluster " + x.GetCluster()
	if x.GetUid() != "" {
		what += ", UID " + x.GetUid()
	}
	if x.GetNodeName() != "" {
		what += ", on node " + x.GetNodeName()
	}
	w.line(0, bold, "%s", what)
	if x.GetServiceAccount() != "" {
		w.line(2, "", "service account %s", x.GetServiceAccount())
	}
	for _, a := range x.GetAgents() {
		state := "until " + stampOf(a.GetExpiresAt())
		if a.GetBanned() {
			state = "banned"
		}
		w.line(2, "", "agent %s, %s", a.GetId(), state)
	}
	far := 0
	for _, r := range x.GetRules() {
		switch {
		case r.GetRefused() != "":
			w.line(2, red, "x %s refuses: %s", r.GetRule(), r.GetRefused())
		case r.GetExpired():
			w.line(2, red, "x %s has ended", r.GetRule())
		case r.GetEntryId() != "":
			more := ""
			if s := r.GetProcessSelectors(); len(s) > 0 {
				more = ", to processes with " + strings.Join(s, ", ")
			}
			if s := r.GetMissingOn(); len(s) > 0 {
				more += ", on nodes with " + strings.Join(s, ", ")
			}
			w.line(2, "", "  %s gives %s%s", r.GetRule(), r.GetSpiffeId(), more)
		default:
			if far++; far > shownCandidates && !w.wide {
				continue
			}
			w.line(2, "", "  %s is for other pods", r.GetRule())
			for _, d := range r.GetDifferences() {
				have := ""
				if len(d.GetHave()) > 0 {
					have = "; the pod has " + strings.Join(d.GetHave()[:min(3, len(d.GetHave()))], ", ")
				}
				w.line(4, red, "x %s (%s%s)", d.GetWant(), d.GetKind(), have)
			}
		}
	}
	more := x.GetMoreRules()
	if !w.wide {
		more += int64(max(0, far-shownCandidates))
	}
	if more > 0 {
		w.line(2, "", "%d further rules are left out", more)
	}
}
