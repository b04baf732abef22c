package xds

import "testing"

// The file is what gRPC's own reader takes: see test/e2e, which has it read.
func TestBootstrap(t *testing.T) {
	got, err := bootstrap("cp.example:8443", "/run/svid", "7f3a")
	if err != nil {
		t.Fatal(err)
	}
	const want = `{
  "certificate_providers": {
    "sallyport": {
      "config": {
        "ca_certificate_file": "/run/svid/bundle.pem",
        "certificate_file": "/run/svid/svid.pem",
        "private_key_file": "/run/svid/svid_key.pem",
        "refresh_interval": "10s"
      },
      "plugin_name": "file_watcher"
    }
  },
  "node": {
    "id": "7f3a"
  },
  "server_listener_resource_name_template": "grpc/server?xds.resource.listening_address=%s",
  "xds_servers": [
    {
      "channel_creds": [
        {
          "config": {
            "ca_certificate_file": "/run/svid/bundle.pem",
            "certificate_file": "/run/svid/svid.pem",
            "private_key_file": "/run/svid/svid_key.pem",
            "refresh_interval": "10s"
          },
          "type": "tls"
        }
      ],
      "server_features": [
        "xds_v3"
      ],
      "server_uri": "cp.example:8443"
    }
  ]
}
`
	if string(got) != want {
		t.Errorf("got %s", got)
	}
}
