package adminapi

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/ca/registry"
)

// Pods knows the pods of clusters and what they stand for.
type Pods interface {
	// Explain answers a request that was checked.
	Explain(context.Context, *adminv1.ExplainPodRequest) (*adminv1.ExplainPodResponse, error)
	// Counts returns for how many pods each templated Identity stands, and how many it refuses, by its name.
	Counts() map[string]PodCount
}

// A PodCount is what a templated Identity makes of all pods at present.
type PodCount struct{ Given, Refused int }

// PodsServer is signet.admin.v1.Pods.
type PodsServer struct {
	adminv1.UnimplementedPodsServer
	*API
}

const (
	// maxPodName bounds each name of a question about a pod.
	maxPodName = 253
	// explainTime bounds the work for one.
	explainTime = 15 * time.Second
)

// ExplainPod implements signet.admin.v1.
func (a PodsServer) ExplainPod(ctx context.Context, req *adminv1.ExplainPodRequest) (*adminv1.ExplainPodResponse, error) {
	for _, f := range []struct{ field, value string }{{"namespace", req.GetNamespace()}, {"name", req.GetName()}, {"cluster", req.GetCluster()}} {
		switch {
		case f.value == "" && f.field != "cluster":
			return nil, a.toStatus(&registry.ValidationError{Field: f.field, Problem: "missing"})
		case len(f.value) > maxPodName:
			return nil, a.toStatus(&registry.ValidationError{Field: f.field, Problem: fmt.Sprintf("has more than %d bytes", maxPodName)})
		}
	}
	templates, _ := a.c.Registry.Templates()
	if a.c.Pods == nil {
		return &adminv1.ExplainPodResponse{Templates: int64(len(templates))}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, explainTime)
	defer cancel()
	out, err := a.c.Pods.Explain(ctx, req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, status.Error(codes.DeadlineExceeded, "comparing the pod with all rules takes too long")
		}
		return nil, a.toStatus(err)
	}
	out.Templates = int64(len(templates))
	return out, nil
}
