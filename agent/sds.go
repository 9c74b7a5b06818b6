package agent

import (
	"google.golang.org/grpc"

	"github.com/signet-id/signet/workloadapi"
	"github.com/signet-id/signet/workloadapi/sds"
)

// SDS says how Envoys find their certificates and validation contexts on the socket. The default is as at SPIRE.
type SDS struct {
	// DefaultSVIDName is the resource with the default X509-SVID. Default default.
	DefaultSVIDName string `yaml:"default_svid_name"`
	// DefaultBundleName is the validation context of the own trust domain. Default ROOTCA.
	DefaultBundleName string `yaml:"default_bundle_name"`
	// DefaultAllBundlesName is the validation context of all trust domains that the caller may know. Default ALL.
	DefaultAllBundlesName string `yaml:"default_all_bundles_name"`
	// DisableSPIFFECertValidation gives Envoys validation contexts without the SPIFFE certificate validator, which alone
	// holds trust domains apart: there is no ALL then. For one Envoy alone: disable_spiffe_cert_validation: true in its
	// node.metadata.
	DisableSPIFFECertValidation bool `yaml:"disable_spiffe_cert_validation"`
}

func (s SDS) config() sds.Config {
	return sds.Config{DefaultSVIDName: s.DefaultSVIDName, DefaultBundleName: s.DefaultBundleName, DefaultAllBundlesName: s.DefaultAllBundlesName,
		DisableSPIFFECertValidation: s.DisableSPIFFECertValidation}
}

func (s SDS) check(bad func(field, format string, args ...any)) {
	c := s.config()
	if err := c.Check(); err != nil {
		bad("sds", "%v", err)
	}
}

// envoys is the service for the socket.
func (a *Agent) envoys() (func(grpc.ServiceRegistrar, *workloadapi.Server), error) {
	c := a.config.SDS.config()
	c.Log, c.OnReject = a.log, a.metrics.rejected.Inc
	return sds.Service(c)
}
