package ca

import (
	"context"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/adminapi"
	"github.com/signet-id/signet/ca/kube/pods"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/spiffe"
)

// maxHave bounds what is said of a pod in the place of one thing that a rule asks for.
const maxHave = 5

// States of a pod in an explanation beside those of package watch.
const (
	podKnown   = "known"
	podUnclear = "unclear"
)

// podExplainer answers operators' questions about pods. It implements adminapi.Pods.
type podExplainer struct{ ca *CA }

// podsForAdmins is nil if no cluster is watched.
func (ca *CA) podsForAdmins() adminapi.Pods {
	if ca.pods == nil {
		return nil
	}
	return podExplainer{ca}
}

// Counts implements adminapi.Pods.
func (p podExplainer) Counts() map[string]adminapi.PodCount {
	out := map[string]adminapi.PodCount{}
	for rule, n := range p.ca.pods.Counts(pods.OriginIdentities) {
		out[strings.TrimPrefix(rule, registry.RuleName(""))] = adminapi.PodCount{Given: n.Pods, Refused: n.Refused}
	}
	return out
}

// Explain implements adminapi.Pods.
func (p podExplainer) Explain(ctx context.Context, req *adminv1.ExplainPodRequest) (*adminv1.ExplainPodResponse, error) {
	out := &adminv1.ExplainPodResponse{}
	for _, k := range p.ca.clusters {
		if k.watcher == nil {
			continue
		}
		name := k.client.Cluster
		out.Clusters = append(out.Clusters, &adminv1.WatchedCluster{Name: name, Synced: p.ca.pods.IsSynced(name), Problem: k.watcher.Problem()})
		if req.GetCluster() != "" && req.GetCluster() != name {
			continue
		}
		known := p.ca.pods.Find(name, req.GetNamespace(), req.GetName())
		for _, uid := range known {
			e, err := p.ca.pods.Explain(ctx, name, uid)
			if err != nil {
				return nil, err
			}
			if e != nil {
				out.Pods = append(out.Pods, p.known(k, e))
			}
		}
		if len(known) == 0 {
			out.Pods = append(out.Pods, lookup(ctx, k, req))
		}
	}
	return out, nil
}

// lookup says how the API server has a pod that is not known.
func lookup(ctx context.Context, k *kubeCluster, req *adminv1.ExplainPodRequest) *adminv1.ExplainedPod {
	out := &adminv1.ExplainedPod{Cluster: k.client.Cluster, Namespace: req.GetNamespace(), Name: req.GetName()}
	f, err := k.watcher.Lookup(ctx, req.GetNamespace(), req.GetName())
	if err != nil {
		out.State, out.Detail = podUnclear, strings.ToValidUTF8(err.Error(), "")
		return out
	}
	out.State, out.Detail, out.Uid, out.NodeName = string(f.State), f.Detail, strings.ToValidUTF8(f.UID, ""), strings.ToValidUTF8(f.NodeName, "")
	return out
}

// known says what there is about a pod that is.
func (p podExplainer) known(k *kubeCluster, e *pods.Explanation) *adminv1.ExplainedPod {
	pod := e.Pod
	out := &adminv1.ExplainedPod{Cluster: pod.Cluster, Namespace: pod.Namespace, Name: pod.Name, Uid: pod.UID, State: podKnown, NodeName: pod.NodeName, NodeUid: pod.NodeUID,
		ServiceAccount: pod.ServiceAccount, Mirror: pod.Mirror, MoreRules: int64(e.More)}
	if pod.NodeUID == "" {
		out.Unplaced = string(k.watcher.Placement(pod.UID))
	}
	var nodes []*registry.Node
	if pod.NodeUID != "" {
		nodes = p.ca.reg.NodesOfPods(pod.Cluster, pod.NodeUID)
	}
	for _, n := range nodes {
		out.Agents = append(out.Agents, &adminv1.NodeAgent{Id: n.ID.String(), ExpiresAt: timestamppb.New(n.ExpiresAt), Banned: n.Banned})
	}
	now := p.ca.c.Now()
	for _, v := range e.Verdicts {
		r := &adminv1.PodRule{Rule: v.Rule, Expired: v.Ended, Refused: strings.ToValidUTF8(v.Refused, "")}
		if v.Entry != nil {
			r.EntryId, r.SpiffeId, r.Expired = string(v.Entry.ID), v.Entry.SPIFFEID.String(), v.Entry.Expired(now) // it may be about to be taken back
			r.MissingOn = missingOn(v.Entry.On, nodes)
			for _, s := range v.Entry.Selectors {
				if s != (spiffe.Selector{Type: "k8s", Value: "pod-uid:" + pod.UID}) {
					r.ProcessSelectors = append(r.ProcessSelectors, s.String())
				}
			}
		}
		for _, d := range v.Differences {
			one := &adminv1.PodDifference{Want: d.Want, Kind: string(d.Kind)}
			for _, h := range d.Have[:min(len(d.Have), maxHave)] {
				one.Have = append(one.Have, strings.ToValidUTF8(h, "")) // labels
			}
			r.Differences = append(r.Differences, one)
		}
		out.Rules = append(out.Rules, r)
	}
	return out
}

// missingOn are the selectors of which no agent of the node has all: those that the first lacks. Where no agent has attested
// there is nothing to say.
func missingOn(on []spiffe.Selector, nodes []*registry.Node) []string {
	var missing []string
	for i, n := range nodes {
		var lacks []string
		for _, s := range on {
			if !slices.Contains(n.Selectors, s) {
				lacks = append(lacks, s.String())
			}
		}
		if len(lacks) == 0 {
			return nil
		}
		if i == 0 {
			missing = lacks
		}
	}
	return missing
}
